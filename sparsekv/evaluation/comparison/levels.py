"""One task, or all tasks, of a benchmark: the mean of every cell of every run, resampled together."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from sparsekv.errors import UserError
from sparsekv.evaluation.comparison.results import CELL, NO_PRESS, Results, check_paired
from sparsekv.evaluation.comparison.statistics import (
    Floats,
    Sampled,
    TaskScores,
    average,
    bootstrap_means,
    by_context,
    ratio,
)

ALL_TASKS = "all tasks"
FULL_CACHE = (NO_PRESS, 0.0)
COLUMN = ["role", "press", "compression_ratio"]
Cell = tuple[str, float]  # press, compression ratio


@dataclass(frozen=True)
class Level:
    """The cells of several runs on the same rows.

    Parameters
    ----------
    benchmark, data_dir, task, metric : str
    headline : bool
        Whether the metric is the task's first.
    lower_is_better : bool
    n : int
        Rows.
    columns : list of (role, press, compression ratio)
        What the columns of `means` and `tasks` are.
    means : Sampled
        Mean scores, which are means over trainings, and those of bootstrap resamples.
    tasks : list of TaskScores
        What they are means of.
    trainings : list of float64[trainings]
        For each column the mean score of each training of its role.
    bounds : mapping
        Cell → how far a press that goes by position alone can come by copying, as a score.
    """

    benchmark: str
    data_dir: str
    task: str
    metric: str
    headline: bool
    lower_is_better: bool
    n: int
    columns: list[tuple[str, str, float]]
    means: Sampled
    tasks: list[TaskScores]
    trainings: list[Floats]
    bounds: Mapping[Cell, float] = field(default_factory=dict)

    @property
    def roles(self) -> set[str]:
        """The runs that have a cell here."""
        return {role for role, _, _ in self.columns}

    def cells(self, *roles: str) -> list[Cell]:
        """The cells that all these runs have: the full cache, then by press and ratio."""
        owned = [{(press, share) for name, press, share in self.columns if name == role} for role in roles]
        return sorted(set.intersection(*owned), key=lambda cell: (cell[0] != NO_PRESS, cell))

    def scores(self, role: str, cells: Sequence[Cell]) -> Sampled:
        """Mean scores of these cells of a run."""
        return self.means.take([self.columns.index((role, *cell)) for cell in cells])

    def paired(self, role: str, other: str, cells: Sequence[Cell]) -> list[TaskScores]:
        """For each task the scores of one role less those of the other, row by row."""
        mine, theirs = ([self.columns.index((name, *cell)) for cell in cells] for name in (role, other))
        return [task.take(mine) - task.take(theirs) for task in self.tasks]

    def differences(self, role: str, other: str, cells: Sequence[Cell]) -> Floats:
        """Mean score of each training of one role less that of the same training of the other, or of its only one:
        float64[trainings, cells].
        """
        mine, theirs = (
            np.column_stack([self.trainings[self.columns.index((name, *cell))] for cell in cells])
            for name in (role, other)
        )
        return mine - theirs

    def retention(self, role: str, cells: Sequence[Cell]) -> Sampled:
        """Score / the run's own full-cache score; of `nll`, the perplexities' full / evicted. NaN where undefined:
        no full-cache cell, a full-cache score of 0, another metric of which less is better.
        """
        scores = self.scores(role, cells)
        full = self.scores(role, [FULL_CACHE]) if FULL_CACHE in self.cells(role) else None
        if full is not None and self.metric == "nll":
            return scores.map(lambda evicted, whole: np.exp(whole - evicted), full)
        if full is None or self.lower_is_better:
            return scores.map(lambda evicted: np.full_like(evicted, np.nan))
        return ratio(scores, full)


def levels(runs: Mapping[str, Results]) -> Iterator[Level]:
    """Every task of every benchmark, and after the tasks of each benchmark their average.

    The average is over tasks, each counting the same (RULER's way), of the tasks that all the runs have and the cells
    that all of these tasks have. Tasks are resampled apart, unless they ask about the same contexts. A data_dir that is
    itself a task (LongBench's) is averaged with the others; one that is a context length (RULER's) is not.

    Parameters
    ----------
    runs : mapping
        Role → the cells of one model and adapter.

    Raises
    ------
    UserError
        Rows that are not the same in all cells: nothing unpaired is ever compared.
    """
    cells = pd.concat([run.cells for run in runs.values()])
    check_paired(cells)
    lower = frozenset[str]().union(*cells.lower_is_better)
    table = pd.concat([run.scores.assign(role=role) for role, run in runs.items()])
    if table.empty:
        return
    table["measure"] = table.metric.where(~table.headline.astype(bool), "")
    table["suite"] = _suites(table)
    group, task = ["benchmark", "suite", "measure"], ["data_dir", "task", "metric"]
    column = [*COLUMN, "training"]
    table["context"] = _contexts(table)
    rows = [*task, "row", "context"]
    wide = table.groupby([*group, *rows, *column]).score.mean().unstack(column)  # generations are averaged
    bounds, shared = _bounds(runs), _shared_contexts(table)
    for (benchmark, suite, measure), tables in wide.groupby(level=group):
        found = []
        for (data_dir, name, metric), values in tables.groupby(level=task):
            known: dict[str, Any] = {"benchmark": benchmark, "data_dir": data_dir, "task": name, "metric": metric}
            known |= {"headline": measure == "", "lower_is_better": metric in lower}
            place = (benchmark, data_dir, name)
            known["bounds"] = bounds.get(place, {}) if measure == "" else {}
            found.append(_one_task(values, shared.get((benchmark, data_dir)), **known))
        yield from found
        yield from _all_tasks(found, suite)


def largest_family(runs: Mapping[str, Results]) -> int:
    """How many p-values are adjusted together at most: what two runs share of tasks × cells of one kind of metric."""
    names = ["headline", *CELL, "task", "metric"]
    cells = [set(run.scores[names].drop_duplicates().itertuples(index=False, name=None)) for run in runs.values()]
    families = (Counter(cell[0] for cell in one & two) for one, two in itertools.combinations(cells, 2))
    return max((size for family in families for size in family.values()), default=0)


def _bounds(runs: Mapping[str, Results]) -> dict[tuple[str, str, str], dict[Cell, float]]:
    """(benchmark, data_dir, task) → the bounds of its cells."""
    bounds: dict[tuple[str, str, str], dict[Cell, float]] = {}
    for run in runs.values():
        for row in run.bounds.itertuples():
            cells = bounds.setdefault((row.benchmark, row.data_dir, row.task), {})
            cells[row.press, row.compression_ratio] = row.bound
    return bounds


def _suites(scores: pd.DataFrame) -> pd.Series:
    """The data_dir within which a score's task is averaged with others."""
    parts = scores.groupby(["benchmark", "task"]).data_dir.transform("nunique")
    tasks = scores.groupby(["benchmark", "data_dir"]).task.transform("nunique")
    several = scores.groupby("benchmark").data_dir.transform("nunique") > 1
    return scores.data_dir.mask(several & (parts == 1) & (tasks == 1) & ~scores.data_dir.str.isdecimal(), "")


def _contexts(table: pd.DataFrame) -> pd.Series:
    """The number of each score's context; where no cell knows it (older ones do not), each row has its own."""
    known = table.context.astype(float).groupby([table.benchmark, table.data_dir, table.row]).transform("first")
    return known.fillna(-1.0 - table.row.astype(float))


def _shared_contexts(table: pd.DataFrame) -> dict[tuple[str, str], pd.Index]:
    """(benchmark, data_dir) → the numbers of its contexts, where several of its tasks ask about the same."""
    return {
        place: pd.Index(np.unique(part.context))
        for place, part in table.groupby(["benchmark", "data_dir"])
        if part.groupby("context").task.nunique().max() > 1
    }


def _one_task(values: pd.DataFrame, shared: pd.Index | None, **known: Any) -> Level:
    """A level from its rows × cells, and the contexts that it shares with other tasks."""
    values = values.dropna(axis=1, how="all")
    lacking = values.isna().sum()
    if lacking.any():
        role, press, share, _ = lacking.idxmax()
        where = " ".join(str(known[key]) for key in ("benchmark", "data_dir", "task") if known[key])
        raise UserError(
            f"{where}: the cell {press} {share:g} of {role} lacks {lacking.max()} of the {len(values)} rows that other "
            "cells have; delete its folder and evaluate it again"
        )
    groups = values.T.groupby(level=COLUMN)
    trainings = [group.mean(axis=1).to_numpy() for _, group in groups]
    array = groups.mean().T.to_numpy(dtype=np.float64)
    contexts = values.index.get_level_values("context")
    drawn = contexts.unique() if shared is None else shared
    # From the name, so that a task's figures do not depend on what else is in the folder. Tasks that share contexts
    # draw from all of them by one seed, so that a context is drawn for all at once.
    name = [known["benchmark"], known["data_dir"], *([known["task"]] if shared is None else [])]
    scores = by_context(array, drawn.get_indexer(contexts), len(drawn), zlib.crc32("/".join(name).encode()))
    means, columns = bootstrap_means(scores), [column for column, _ in groups]
    return Level(**known, n=len(array), columns=columns, means=means, tasks=[scores], trainings=trainings)


def _all_tasks(tasks: Sequence[Level], suite: str) -> Iterator[Level]:
    """The tasks' average, if they have a cell in common."""
    roles = set[str]().union(*(task.roles for task in tasks))
    tasks = [task for task in tasks if task.roles == roles] or tasks
    columns = [column for column in tasks[0].columns if all(column in task.columns for task in tasks)]
    if columns:
        places = [[task.columns.index(column) for column in columns] for task in tasks]
        yield replace(
            tasks[0],
            data_dir=suite,
            task=ALL_TASKS,
            metric=", ".join(sorted({task.metric for task in tasks})),
            n=sum(task.n for task in tasks),
            columns=columns,
            means=average([task.means.take(place) for task, place in zip(tasks, places, strict=True)]),
            tasks=[each.take(place) for task, place in zip(tasks, places, strict=True) for each in task.tasks],
            trainings=[
                np.mean([task.trainings[place[index]] for task, place in zip(tasks, places, strict=True)], axis=0)
                for index in range(len(columns))
            ],
            bounds={
                cell: sum(task.bounds[cell] for task in tasks) / len(tasks)
                for cell in set[Cell].intersection(*(set(task.bounds) for task in tasks))
            },
        )
