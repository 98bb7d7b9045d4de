"""The page's first answer: what eviction costs each run, and what training changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparsekv.evaluation.comparison.compare import Analysis
from sparsekv.evaluation.comparison.levels import ALL_TASKS
from sparsekv.evaluation.comparison.tables import figure_text, headlines
from sparsekv.report.cells import file_stem
from sparsekv.report.chart import Section, TextTable
from sparsekv.report.collect import EvaluatedRun, Evidence

INTRO = (
    "The full cache comes first, so that retention cannot hide what training itself lost. A gain that the control "
    "shows too comes from the data and not from training with eviction."
)
CAPTION = (
    "Mean over rows with its 95% bootstrap interval. ▲ better, ▼ worse, = no difference: p below 0.05 in a paired "
    "sign-flip test, Holm-adjusted over the cells of a run."
)


@dataclass(frozen=True)
class BigFigure:
    """One number at the top of the page: what it is, and what belongs to it."""

    label: str
    value: str
    detail: str


def build(evidence: Evidence) -> Section:
    """A table for each benchmark and trained run."""
    title = "Headline"
    if not evidence.analyses:
        return Section("headline", title, missing="No finished cell here: `sparsekv eval --out DIR` evaluates a model.")
    tables = [table for analysis in evidence.analyses for table in _tables(evidence, analysis)]
    return Section("headline", title, " ".join([INTRO, *_lacking(list(evidence.runs.values()))]), tables=tables)


def _tables(evidence: Evidence, analysis: Analysis) -> Iterator[TextTable]:
    for place, table in headlines(analysis).items():
        name = file_stem("headline", analysis.role, *place)
        sources = tuple(evidence.runs[role].folder for role in table.header[1:])
        yield TextTable(name, table.title, CAPTION, sources, table.header, table.rows)


def _lacking(runs: list[EvaluatedRun]) -> Iterator[str]:
    """A sentence for each run that lacks benchmarks which others have."""
    everything = set[tuple[str, str]]().union(*(run.benchmarks() for run in runs))
    for run in runs:
        lacking = sorted(" ".join(filter(None, each)) for each in everything - run.benchmarks())
        if lacking:
            yield f"{run.role} has no finished cell of {', '.join(lacking)}, so nothing is compared there."


def figures(evidence: Evidence) -> list[BigFigure]:
    """Mean retention of every benchmark, before and after training."""
    return [figure for analysis in evidence.analyses for figure in _figures(analysis)]


def _figures(analysis: Analysis) -> Iterator[BigFigure]:
    headline = analysis.headline
    if headline.empty or "retention" not in headline:
        return
    overall = headline[(headline.task == ALL_TASKS) & headline.headline & headline.retention.notna()]
    for (benchmark, data_dir), table in overall.groupby(["benchmark", "data_dir"]):
        runs = {row["run"]: row for row in table.to_dict("records")}
        last = runs.get(analysis.role)
        if last is not None:
            before = [role for role in ("base",) if role in runs and role != analysis.role]
            value = " → ".join(f"{runs[role]['retention']:.0%}" for role in (*before, analysis.role))
            label = " ".join(filter(None, [benchmark, data_dir])) + ": mean retention"
            yield BigFigure(label, value, _detail([*before, analysis.role], runs, last))


def _detail(shown: list[str], runs: Mapping[str, Mapping[str, Any]], last: Mapping[str, Any]) -> str:
    parts = [f"{' → '.join(shown)}, mean of {last['cells']} evicted cells, n = {last['n']}"]
    parts += [f"{role} {row['retention']:.0%}" for role, row in runs.items() if role not in shown]
    if pd.notna(last.get("gap_closed")):
        parts.append(f"gap to base's full cache closed by {figure_text(last, 'gap_closed', '{:.0%}')}")
    return "; ".join(parts)
