"""The goals of the experiment plan, from the compare.csv of base, control and trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsekv.errors import UserError, require
from sparsekv.evaluation.comparison.compare import ROLES
from sparsekv.evaluation.comparison.levels import ALL_TASKS
from sparsekv.evaluation.comparison.results import CELL, NO_PRESS

CONTENT = (
    "snapkv",
    "critical_snapkv",
    "kvzip",
    "knorm",
    "keydiff",
    "expected_attention",
)  # presses that read the cache
MOST = 0.7  # the ratio at which a press should lose nothing
TEXT = [*CELL[:3], "run", "model", "adapter", "task", "metric", "seed", "commit", "reason"]


class Goal(NamedTuple):
    """A goal and what became of it.

    name : what is measured.
    value : the figure that decides; NaN where nothing was measured.
    shown : the figure as text, with what stands behind it.
    goal : the bound, as text.
    met : None where nothing was measured.
    n : cells that the figure is of.
    """

    name: str
    value: float
    shown: str
    goal: str
    met: bool | None
    n: int


class Cells(NamedTuple):
    """Rows of a compare.csv by role, each with the same index: `CELL`."""

    base: pd.DataFrame
    control: pd.DataFrame
    trained: pd.DataFrame

    def where(self, chosen: pd.Series) -> Cells:
        """The cells of which this holds."""
        return Cells(*(table[chosen] for table in self))


def read_compare(file: Path) -> pd.DataFrame:
    """A compare.csv with base, control and trained; text is never NaN.

    Raises
    ------
    UserError
        It is none, or lacks a role.
    """
    try:
        table = pd.read_csv(file, converters=dict.fromkeys(TEXT, str))  # a task may be called NA
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: no compare.csv ({reason}); `sparsekv compare --output` writes it") from error
    lacking = {"diff_control_min", "bound", "seeds"} - set(table) | set(ROLES) - set(table.get("run", ()))
    require(not lacking, f"{file}: lacks {', '.join(sorted(lacking))}; compare base, control and trained")
    return table


def goals(table: pd.DataFrame) -> list[Goal]:
    """Every goal, in the order of the plan.

    Parameters
    ----------
    table : DataFrame
        From `read_compare`. A cell is a benchmark, length, press and ratio, averaged over tasks; its score is the
        benchmark's first metric: needles' in percent, nats of text.
    """
    scored = table[table.headline.astype(bool) & (table.reason == "")]
    averages, tasks = (_cells(scored[chosen]) for chosen in (scored.task == ALL_TASKS, scored.task != ALL_TASKS))
    needles = averages.where(~averages.base.lower_is_better.astype(bool))
    text = averages.where(averages.base.metric == "nll")
    return [
        _worse("cells significantly worse than control", averages),
        _worse("the same, single tasks", tasks.where(~tasks.base.lower_is_better.astype(bool))),
        _better(averages),
        _retention(needles),
        *_gap_closed(needles),
        _full_score(needles),
        _full_perplexity(text),
        _nothing_lost(needles, text),
        _above_bound(needles),
    ]


def _cells(rows: pd.DataFrame) -> Cells:
    """The cells that all roles have."""
    key = [*CELL, "task"]
    tables = [rows[rows.run == role].set_index(key) for role in ROLES]
    shared = tables[0].index.intersection(tables[1].index).intersection(tables[2].index)
    return Cells(*(table.loc[shared].reset_index("task") for table in tables))


def _goal(name: str, value: float, shown: str, goal: str, met: bool, n: int) -> Goal:
    """A goal; not measured where it is of no cell."""
    return Goal(name, float(value), shown, goal, bool(met), n) if n else Goal(name, np.nan, "–", goal, None, 0)


def _evicted(cells: Cells) -> Cells:
    return cells.where(_press(cells) != NO_PRESS)


def _full(cells: Cells) -> Cells:
    return cells.where(_press(cells) == NO_PRESS)


def _press(cells: Cells) -> pd.Series:
    return cells.base.index.get_level_values("press").to_series(index=cells.base.index)


def _worse(name: str, cells: Cells) -> Goal:
    """Full-cache cells too."""
    worse = int((cells.trained.verdict_control == "worse").sum())
    return _goal(name, worse, str(worse), "0", worse == 0, len(cells.trained))


def _better(cells: Cells) -> Goal:
    """Of the cells with room: where the control's retention lies below 1 with its whole interval. Retention is paired
    by row, so this says as much as that the interval of the difference full − evicted lies above 0.
    """
    control = _evicted(cells).control
    below = control.retention_high.fillna(control.retention) < 1  # all rows equal: there is no interval
    better = _evicted(cells).where(below).trained.verdict_control == "better"
    share, n = better.mean(), len(better)
    name = "cells with room that are significantly better than control"
    return _goal(name, share, f"{share:.0%} ({better.sum()})", "≥ 80%", share >= 0.8, n)


def _retention(needles: Cells) -> Goal:
    means = [table.retention.mean() for table in _evicted(needles)]
    shown = " → ".join(f"{mean:.3f}" for mean in means)
    n = int(_evicted(needles).trained.retention.notna().sum())
    return _goal("mean retention on needles, base → control → trained", means[2], shown, "≥ 0.75", means[2] >= 0.75, n)


def _gap_closed(needles: Cells) -> Iterator[Goal]:
    """Σ (trained − reference) / Σ (reference with the full cache − reference), over cells of content-based presses."""
    evicted = _evicted(needles)
    evicted = evicted.where(_press(evicted).isin(CONTENT))
    for role in ("base", "control"):
        reference = getattr(evicted, role).score
        place = ["benchmark", "data_dir"]
        full = getattr(_full(needles), role).reset_index().groupby(place).score.first().rename("full")
        gap = reference.reset_index().join(full, on=place).full.to_numpy() - reference
        known = gap.notna()
        gained = (evicted.trained.score - reference)[known].sum()
        closed = gained / gap[known].sum() if gap[known].sum() > 0 else np.nan
        name = f"share of {role}'s gap closed on needles, content-based presses"
        n = int(known.sum()) if not np.isnan(closed) else 0
        yield _goal(name, closed, f"{closed:.3f}", "≥ 0.7", closed >= 0.7, n)


def _full_score(needles: Cells) -> Goal:
    """The worst of the lengths."""
    worst = _full(needles).trained.diff_control.min()
    name = "full-cache score on needles, trained − control, worst length"
    return _goal(name, worst, f"{worst:+.1f} points", "≥ −1 point", worst >= -1, len(_full(needles).trained))


def _full_perplexity(text: Cells) -> Goal:
    """Means of nll become perplexities: exp(trained − control) − 1, the worst of the lengths."""
    worst = np.expm1(_full(text).trained.diff_control.max())
    name = "full-cache perplexity, trained against control, worst length"
    return _goal(name, worst, f"{worst:+.1%}", "≤ +1%", worst <= 0.01, len(_full(text).trained))


def _nothing_lost(needles: Cells, text: Cells) -> Goal:
    """Presses whose retention at 0.7 is above 0.99 everywhere: on needles the score's, on text the perplexity's."""
    kept = [_evicted(cells).trained.retention.rename("kept").reset_index() for cells in (needles, text)]
    least = [table[np.isclose(table.compression_ratio, MOST)].groupby("press").kept.min() for table in kept]
    both = pd.concat(least, axis=1, keys=["needles", "text"], join="inner")
    good = both.index[(both > 0.99).all(axis=1)]
    shown = f"{len(good)}" + (f" ({', '.join(good)})" if len(good) else "")
    name = f"presses that lose less than 1% at {MOST:g} of their own full cache, on perplexity and needles"
    return _goal(name, len(good), shown, "≥ 3", len(good) >= 3, len(both))


def _above_bound(needles: Cells) -> Goal:
    """Cells of positional presses whose score lies above the bound with its whole interval."""
    trained = needles.trained[needles.trained.bound.notna()]
    above = trained.ci_low.fillna(trained.score) > trained.bound
    n = len(trained)
    shown = f"{above.sum()} of {n}, on average {(trained.score - trained.bound).mean():+.1f} points"
    return _goal("cells of positional presses above their bound on needles", above.sum(), shown, "all", above.all(), n)
