"""Every run's configuration and versions: what is needed to do it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekv.evaluation.comparison.cell_files import FINISHED
from sparsekv.evaluation.comparison.tables import NONE
from sparsekv.report.chart import Section, TextTable
from sparsekv.report.collect import AttentionAnalysis, EvaluatedRun, Evidence, Training

FINDINGS = {"overall", "layers", "difference", "descriptions", "recommendation", "token_shares"}  # of an analysis


def build(evidence: Evidence) -> Section:
    """A table for the evaluations, one for the trainings, one for the analyses; a column each."""
    evaluations = {role: _evaluation(run) for role, run in evidence.runs.items()}
    trainings = {training.name: _training(training) for training in evidence.trainings}
    analyses = {str(each.folder): _analysis(each) for each in evidence.attention}
    tables = [
        _table("runs_evaluated", "Evaluations", evaluations, [run.folder for run in evidence.runs.values()]),
        _table("runs_trained", "Trainings", trainings, [training.folder for training in evidence.trainings]),
        _table("runs_analyzed", "Attention analyses", analyses, [each.folder for each in evidence.attention]),
    ]
    intro = "Where cells of a run differ in an option, all its values are listed."
    return Section("runs", "Runs", intro, tables=[table for table in tables if table.rows])


def _table(name: str, title: str, columns: Mapping[str, Mapping[str, str]], sources: Iterable[Path]) -> TextTable:
    """A row for each option, in the order in which they come first."""
    options = dict.fromkeys(option for column in columns.values() for option in column)
    rows = [[option, *(column.get(option, NONE) for column in columns.values())] for option in options]
    return TextTable(name, title, "", tuple(sources), ["", *columns], rows)


def _evaluation(run: EvaluatedRun) -> dict[str, str]:
    cells = run.results.cells
    merged: dict[str, list[str]] = {"model": [run.model], "adapter": [run.adapter or NONE], "folder": [str(run.folder)]}
    for cell in cells.to_dict("records"):
        file = cell["folder"] / FINISHED[2]
        profile = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        made_by = {key: profile[key] for key in ("commit", "device", "versions") if key in profile}
        for option, value in _flat({**made_by, **cell["settings"]}):
            if value not in merged.setdefault(option, []):
                merged[option].append(value)
    return {option: ", ".join(values) for option, values in merged.items()}


def _training(training: Training) -> dict[str, str]:
    record = {key: value for key, value in training.record.items() if key != "config"}
    return dict(_flat({"folder": str(training.folder), **record, **training.config}))


def _analysis(attention: AttentionAnalysis) -> dict[str, str]:
    return dict(_flat({key: value for key, value in attention.analysis.items() if key not in FINDINGS}))


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`anchors.sink_size` → 4."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else NONE if value is None else json.dumps(value)
