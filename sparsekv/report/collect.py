"""What there is to report: every evaluated run, training and attention analysis below some folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sparsekv.analysis.names import ANALYSIS, HEADS
from sparsekv.analysis.results import load_analysis, load_heads
from sparsekv.errors import UserError, require
from sparsekv.evaluation.comparison.cell_files import FINISHED
from sparsekv.evaluation.comparison.compare import ROLES, Analysis, analyze
from sparsekv.evaluation.comparison.results import Results, load_results
from sparsekv.files import RUN_CONFIG

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class EvaluatedRun:
    """A model, with or without an adapter, and its cells.

    Parameters
    ----------
    role : str
        base, control or trained; where several were trained, the name of a trained one's folder.
    folder : Path
        Of its cells.
    results : Results
        Of this run alone.
    views, needles : list of Path
        What the evaluation kept for the token viewer and the failure map.
    """

    role: str
    folder: Path
    results: Results
    views: list[Path]
    needles: list[Path]

    @property
    def model(self) -> str:
        """As it was named in the evaluation."""
        return str(self.results.cells.model.iloc[0])

    @property
    def adapter(self) -> str:
        """As it was named in the evaluation; "" for none."""
        return str(self.results.cells.adapter.iloc[0])

    def benchmarks(self) -> set[tuple[str, str]]:
        """(benchmark, data_dir) of every cell with scores."""
        scored = self.results.scores[["benchmark", "data_dir"]]
        return set(scored.itertuples(index=False, name=None))


@dataclass(frozen=True)
class Training:
    """A training: its options, the whole of eit_config.json, and metrics.jsonl, one row a line of it."""

    name: str
    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: pd.DataFrame


@dataclass(frozen=True)
class AttentionAnalysis:
    """attention_analysis.json and attention_analysis.parquet of a folder."""

    folder: Path
    analysis: dict[str, Any]
    heads: pd.DataFrame


@dataclass(frozen=True)
class Evidence:
    """All that a page is made from.

    Parameters
    ----------
    runs : dict
        Role → run: base, control, then what was trained.
    analyses : list of Analysis
        For each trained run, itself with base and control; where nothing was trained, base and control.
    trainings : list of Training
    attention : list of AttentionAnalysis
    """

    runs: dict[str, EvaluatedRun]
    analyses: list[Analysis]
    trainings: list[Training]
    attention: list[AttentionAnalysis]

    @property
    def model(self) -> str:
        """What all of it is about."""
        return next(iter(_models(self).values()))


def collect(folders: Sequence[Path]) -> Evidence:
    """Read all that is in these folders and below them.

    Raises
    ------
    UserError
        A folder that is not there or holds nothing to report; something corrupt or of another version; runs that do
        not belong together: of different models, two bases or controls, without a benchmark in common, or with other
        rows.
    """
    found: list[tuple[Path, Results]] = []
    trainings: list[Training] = []
    attention: list[AttentionAnalysis] = []
    for folder in _outermost(folders):
        parts = list(_evaluated(folder)), list(_trainings(folder)), list(_attention(folder))
        require(
            any(parts),
            f"{folder}: nothing to report: no finished cell of `sparsekv eval`, no training, no attention analysis",
        )
        found += parts[0]
        trainings += parts[1]
        attention += parts[2]
    runs = _by_role(found)
    _check_shared_benchmark(list(runs.values()))
    evidence = Evidence(runs, _analyses(runs), _named_apart(trainings), attention)
    _check_same_model(evidence)
    return evidence


def _outermost(folders: Sequence[Path]) -> list[Path]:
    """The folders, each once, without those inside another one."""
    for folder in folders:
        found = "is a file" if folder.is_file() else "no such folder"
        require(folder.is_dir(), f"{folder}: {found}; name folders that eval, train, analyze or demo wrote")
    places = {folder.resolve(): folder for folder in folders}
    return [folder for place, folder in places.items() if not places.keys() & set(place.parents)]


def _evaluated(folder: Path) -> Iterator[tuple[Path, Results]]:
    """Every run with scores, and the folder of its cells."""
    for parent in sorted({path.parent.parent for path in folder.rglob(FINISHED[0]) if "__" in path.parent.name}):
        results = load_results(parent)
        for model, adapter in results.runs():
            run = results.run(model, adapter)
            if not run.scores.empty:
                yield parent, run


def _trainings(folder: Path) -> Iterator[Training]:
    """Every training that has measured something."""
    for file in sorted(folder.rglob(METRICS)):
        record_file = file.with_name(RUN_CONFIG)
        if record_file.is_file():
            record = _parse(record_file.read_bytes(), record_file)
            config = _config(record, record_file)
            *lines, _ = file.read_bytes().split(b"\n")  # a torn last line is being written
            metrics = [_parse(line, file) for line in lines]
            require(all("step" in each for each in metrics), f"{file}: corrupt (a line has no step)")
            if metrics:
                yield Training(file.parent.name, file.parent, config, record, pd.DataFrame(metrics))


def _named_apart(trainings: Sequence[Training]) -> list[Training]:
    """Those in folders of the same name get their whole path for a name."""
    names = [training.name for training in trainings]
    return [each if names.count(each.name) == 1 else replace(each, name=str(each.folder)) for each in trainings]


def _attention(folder: Path) -> Iterator[AttentionAnalysis]:
    """Every finished analysis."""
    for file in sorted(folder.rglob(ANALYSIS)):
        yield AttentionAnalysis(file.parent, load_analysis(file), load_heads(file.with_name(HEADS)))


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    """The mapping that a JSON text from the file holds."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: corrupt ({error})") from error
    require(isinstance(value, dict), f"{file}: corrupt ({text[:40]!r} is no mapping)")
    return dict(value)


def _config(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """The options in a training's record."""
    config = record.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{file}: corrupt (it has no config)")
    return config


def _by_role(found: Sequence[tuple[Path, Results]]) -> dict[str, EvaluatedRun]:
    """Role → run, in the order of the page."""
    roles = [_role(folder, results) for folder, results in found]
    trained = [folder.name for (folder, _), role in zip(found, roles, strict=True) if role == "trained"]
    runs: dict[str, EvaluatedRun] = {}
    for (folder, results), role in sorted(zip(found, roles, strict=True), key=lambda pair: ROLES.index(pair[1])):
        if role == "trained" and len(trained) > 1:
            clear = trained.count(folder.name) == 1 and folder.name not in ROLES
            role = folder.name if clear else results.runs()[0][1]
        views, needles = sorted(folder.glob("views/*.json.gz")), sorted(folder.glob("needles/*.csv"))
        run = EvaluatedRun(role, folder, results, views, needles)
        other = runs.setdefault(role, run)
        require(other is run, f"{other.folder} and {folder}: both hold {role}; a report is of one, so name its folder")
    return runs


def _role(folder: Path, results: Results) -> str:
    """An adapter's own record says whether it is a control; where it is out of reach, the names do."""
    adapter = results.runs()[0][1]
    if not adapter:
        return "base"
    record = Path(adapter) / RUN_CONFIG
    if record.is_file():
        control = _config(_parse(record.read_bytes(), record), record).get("control", False)
    else:
        control = any("control" in name for name in (folder.name, *Path(adapter).parts[-2:]))
    return "control" if control else "trained"


def _analyses(runs: Mapping[str, EvaluatedRun]) -> list[Analysis]:
    references = {role: runs[role].results for role in ROLES[:2] if role in runs}
    trained = [role for role in runs if role not in references]
    compared = [references | {role: runs[role].results} for role in trained]
    return [analyze(group) for group in compared or [references] if group]


def _check_shared_benchmark(runs: Sequence[EvaluatedRun]) -> None:
    for run in runs[1:]:
        require(
            bool(run.benchmarks() & runs[0].benchmarks()),
            f"{runs[0].folder} and {run.folder}: no benchmark in common, so there is nothing to compare",
        )


def _models(evidence: Evidence) -> dict[Path, str]:
    """Where a model is named → the name."""
    evaluated = {run.folder: run.model for run in evidence.runs.values()}
    trained = {training.folder: str(training.config.get("model")) for training in evidence.trainings}
    return evaluated | trained | {each.folder: str(each.analysis["model"]) for each in evidence.attention}


def _check_same_model(evidence: Evidence) -> None:
    """The last part of a name counts: the same model may have been read from the Hub here and from a folder there."""
    (first, model), *others = _models(evidence).items()
    for folder, other in others:
        same = Path(other).name == Path(model).name
        require(same, f"{folder} is of {other}, {first} of {model}; a report is of one model: name its folders")
