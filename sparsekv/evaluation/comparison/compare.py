"""What eviction costs each run, and what training changed, cell by cell."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console

from sparsekv.errors import require
from sparsekv.evaluation.comparison import tables
from sparsekv.evaluation.comparison.levels import ALL_TASKS, FULL_CACHE, Level, largest_family, levels
from sparsekv.evaluation.comparison.results import CELL, NO_PRESS, RUN, Results, load_results
from sparsekv.evaluation.comparison.roles import comparisons, with_own_base
from sparsekv.evaluation.comparison.statistics import Floats, Sampled, flips_for, holm, interval, p_values, ratio
from sparsekv.files import check_writable, write_text, writing

ROLES = ("base", "control", "trained")
SIGNIFICANT = 0.05
PLACE = ["run", "benchmark", "data_dir", "task", "metric"]
COLUMNS = [
    *("run", "model", "adapter", "benchmark", "data_dir", "task", "metric", "press", "compression_ratio", "n"),
    *("score", "ci_low", "ci_high", "retention", "retention_low", "retention_high", "bound"),
]
DIFFERENCES = ["diff_{}", "diff_{}_low", "diff_{}_high", "p_{}", "diff_{}_min", "diff_{}_max", "verdict_{}"]
LAST_COLUMNS = ["headline", "lower_is_better", "seeds", "seed", "commit", "reason"]


class Analysis(NamedTuple):
    """Figures of up to three runs.

    summary : one row a run, cell, task and metric, and one for the average over the tasks of each benchmark.
        run, model, adapter, benchmark, data_dir, task (`ALL_TASKS` for the average), metric, press, compression_ratio,
        n (rows), score, ci_low, ci_high, retention, retention_low, retention_high (1 = nothing lost), bound (the score
        that copying gives a press that goes by position alone); with base, and the same with control, diff_base (score
        less base's), diff_base_low, diff_base_high, p_base (sign flips, Holm over the cells of the run),
        diff_base_min, diff_base_max (of single trainings), verdict_base (better, worse, no difference); headline
        (whether the metric is the benchmark's first), lower_is_better, seeds (trainings), seed (of the evaluation),
        commit; reason: why the cell has no score. NaN where undefined.
    headline : one row a run, benchmark, task and metric.
    role : the last run's, which is compared with the others.
    flips : sign flips behind each p-value.
    """

    summary: pd.DataFrame
    headline: pd.DataFrame
    role: str
    flips: int


def write_summary(folder: str | Path) -> None:
    """Write summary.csv, summary.parquet and summary.md of a folder of cells into it, each atomically.

    Where the folder also holds the same model without an adapter, that is the base of its trained runs.
    """
    folder = Path(folder)
    results = load_results(folder)
    analyses = [analyze(with_own_base(results, model, adapter)) for model, adapter in results.runs()]
    summary = _of_last_role(analyses)
    _write_text(folder / "summary", summary, "Results", analyses)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".summary") as temporary:
        summary.to_parquet(Path(temporary) / "summary.parquet", index=False)
        os.replace(Path(temporary) / "summary.parquet", folder / "summary.parquet")


def compare(folders: Sequence[str], output: str | None = None) -> None:
    """Print the cells of two or three runs side by side, and what training changed.

    Parameters
    ----------
    folders : sequence of str
        Base and trained, or base, control and trained; with commas, of trainings that differ in their seed.
    output : str, optional
        Folder for the same tables as compare.md, and every figure as compare.csv.

    Raises
    ------
    UserError
        Another number of folders; runs that do not belong together; no cell in common.
    """
    require(len(folders) in (2, 3), f"compare: {len(folders)} folders given; it takes base [control] trained")
    for role in folders:
        require(all(role.split(",")), f"compare {role!r}: names no folder before or after a comma")
    named = [{Path(folder).resolve() for folder in role.split(",")} for role in folders]
    twice = next((one & other for one, other in itertools.combinations(named, 2) if one & other), set())
    require(not twice, f"compare: {', '.join(map(str, sorted(twice)))} stands for two runs; give each its own folder")
    if output is not None:
        check_writable(Path(output), "--output")
    *others, trained = [[load_results(folder) for folder in role.split(",")] for role in folders]
    swapped = others[0][0].cells.adapter.any() and not any(results.cells.adapter.any() for results in trained)
    require(
        not swapped, f"compare {folders[0]} … {folders[-1]}: the first has an adapter and the last none; base first"
    )
    for role, other in zip(ROLES, others, strict=False):
        paired = len(other) in (1, len(trained))
        require(paired, f"{role}: {len(other)} seeds, trained: {len(trained)}; give as many of both, or one {role}")
    analyses = [analyze(runs) for runs in comparisons(trained, dict(zip(ROLES, others, strict=False)))]
    for summary, role in ((analysis.summary, analysis.role) for analysis in analyses):
        shared = "diff_base" in summary and summary.diff_base[summary.run == role].notna().any()
        require(shared, f"{folders[0]} and {folders[-1]}: no finished cell in common, so there is nothing to compare")
    tables.show(analyses, Console())
    if output is not None:
        summary = pd.concat([analysis.summary for analysis in analyses], ignore_index=True)
        with writing(Path(output), "--output"):
            _write_text(Path(output) / "compare", summary, "Comparison", analyses)


def _write_text(path: Path, summary: pd.DataFrame, title: str, analyses: Sequence[Analysis]) -> None:
    write_text(path.with_suffix(".csv"), summary.to_csv(index=False, float_format="%.6g"))
    write_text(path.with_suffix(".md"), tables.markdown(title, analyses))


def _of_last_role(analyses: Sequence[Analysis]) -> pd.DataFrame:
    rows = [each.summary[each.summary.run == each.role].drop(columns="run") for each in analyses]
    return pd.concat(rows, ignore_index=True)


def analyze(runs: Mapping[str, Results]) -> Analysis:
    """Compare runs, each of one model and adapter, with those before them.

    Parameters
    ----------
    runs : mapping
        Role (base, control, trained) → run; the last one is what matters.
    """
    rows, headlines, flips = [], [], flips_for(largest_family(runs))
    for level in levels(runs):
        present = [role for role in runs if role in level.roles]
        for place, role in enumerate(present):
            rows.append(_rows(level, role, present[:place], flips))
            headlines.append(_headline(level, role))
    rows += [_unavailable(run, role) for role, run in runs.items()]
    summary = pd.concat([table for table in rows if not table.empty], ignore_index=True)
    for role, run in runs.items():
        mine = summary.run == role
        for key, several in zip(RUN, zip(*run.runs(), strict=True), strict=True):
            summary.loc[mine, key] = ", ".join(dict.fromkeys(several))
        summary.loc[mine, "seeds"] = max(1, run.scores.training.nunique())
        for key in ("seed", "commit"):
            summary.loc[mine, key] = ", ".join(sorted({str(value) for value in run.cells[key]} - {""}))
    headline = pd.DataFrame(headlines)
    compared = [role for role in runs if f"diff_{role}" in summary]
    for other in compared:
        _judge(summary, other)
        headline = headline.join(_counts(summary, other), on=PLACE)
    differences = [name.format(other) for other in compared for name in DIFFERENCES]
    return Analysis(summary.reindex(columns=[*COLUMNS, *differences, *LAST_COLUMNS]), headline, list(runs)[-1], flips)


def _place(level: Level, role: str) -> dict[str, Any]:
    """Which run, task and metric a row of a table is about."""
    names = [*PLACE[1:], "n", "headline", "lower_is_better"]
    return {"run": role} | {name: getattr(level, name) for name in names}


def _rows(level: Level, role: str, references: Sequence[str], flips: int) -> pd.DataFrame:
    """One row for each cell of a run, compared with the runs that the references name."""
    cells = level.cells(role)
    table = pd.DataFrame(cells, columns=["press", "compression_ratio"]).assign(**_place(level, role), reason="")
    score, retention = level.scores(role, cells), level.retention(role, cells)
    table["score"], (table["ci_low"], table["ci_high"]) = score.value, interval(score)
    table["retention"], (table["retention_low"], table["retention_high"]) = retention.value, interval(retention)
    table["bound"] = [level.bounds.get(cell, np.nan) for cell in cells]
    for other in references:
        shared = level.cells(role, other)
        difference = level.scores(role, shared) - level.scores(other, shared)
        p = p_values(level.paired(role, other, shared), flips)
        single = level.differences(role, other, shared)
        figures = np.column_stack([difference.value, *interval(difference), p, single.min(axis=0), single.max(axis=0)])
        columns = [name.format(other) for name in DIFFERENCES[:-1]]
        table[columns] = np.nan
        table.loc[[cells.index(cell) for cell in shared], columns] = figures
    return table


def _unavailable(run: Results, role: str) -> pd.DataFrame:
    """One row for each cell without a score."""
    table = run.cells[run.cells.reason != ""].drop_duplicates(CELL)[[*CELL, "reason"]]
    return table.assign(run=role, task=ALL_TASKS, metric="", n=0, headline=True, lower_is_better=False)


def _headline(level: Level, role: str) -> dict[str, Any]:
    """A run's full-cache score, its means over the evicted cells that all runs have, and how much of the gap is closed.

    Means over cells are resampled with the same rows in every cell.
    """
    evicted = [cell for cell in level.cells(*level.roles) if cell[0] != NO_PRESS]
    row = _place(level, role) | {"cells": len(evicted), "note": ""}
    if FULL_CACHE in level.cells(role):
        row |= _figure("full", level.scores(role, [FULL_CACHE]))
    if evicted:
        row |= _figure("evicted", level.scores(role, evicted).mean())
        row |= _figure("retention", level.retention(role, evicted).mean())
        if "base" in level.roles - {role} and FULL_CACHE in level.cells("base"):
            gained = (level.scores(role, evicted) - level.scores("base", evicted)).mean()
            gap = (level.scores("base", [FULL_CACHE]) - level.scores("base", evicted)).mean()
            if level.lower_is_better:
                gained, gap = gained.map(np.negative), gap.map(np.negative)
            row |= _figure("gap_closed", ratio(gained, gap))
            row["note"] = "" if gap.value[0] > 0 else "base loses nothing in these cells: no gap to close"
    return row


def _figure(name: str, sampled: Sampled) -> dict[str, float]:
    """A single figure and its interval."""
    low, high = interval(sampled)
    return {name: sampled.value.item(), f"{name}_low": low.item(), f"{name}_high": high.item()}


def _judge(summary: pd.DataFrame, other: str) -> None:
    """Adjust the p-values of the differences to `other`, and say which differences they leave.

    The cells of one run are one family: those of averages over tasks, those of single tasks, and the same of secondary
    metrics are adjusted apart. Of several trainings, every single one must be better for a cell to be better; nothing
    more is asked of a cell that is worse.
    """
    p, difference = f"p_{other}", summary[f"diff_{other}"]
    family = summary.groupby(["run", summary.task == ALL_TASKS, "headline"])[p]
    summary[p] = family.transform(lambda values: holm(values.to_numpy()))
    gain: Floats = np.where(summary.lower_is_better.astype(bool), -difference, difference)
    names = np.where(gain > 0, "better", "worse")
    alike = np.where(difference > 0, summary[f"diff_{other}_min"] > 0, summary[f"diff_{other}_max"] < 0)
    names = np.where((summary[p] < SIGNIFICANT) & (alike | (gain < 0)), names, "no difference")
    summary[f"verdict_{other}"] = np.where(difference.isna(), "", names)


def _counts(summary: pd.DataFrame, other: str) -> pd.DataFrame:
    """How many evicted cells of each headline row are better, worse and not different: better_<other>, …"""
    compared = summary[(summary.press != NO_PRESS) & summary[f"diff_{other}"].notna()]
    counts = compared.groupby([*PLACE, f"verdict_{other}"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["better", "worse", "no difference"], fill_value=0)
    return counts.set_axis([f"better_{other}", f"worse_{other}", f"same_{other}"], axis=1)
