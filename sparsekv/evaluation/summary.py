"""Scores of base, control and trained as a table, with intervals and the paired difference that matters."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap

from sparsekv.evaluation.evicted import NO_PRESS, Score

TASKS = {
    "needle": "Needle: number found after eviction (higher is better)",
    "text": "Text: perplexity of what follows (lower is better)",
}


def summarize(task: str, scores: Mapping[str, Sequence[Score]], cells: Sequence[tuple[str, float]]) -> list[list[str]]:
    """A header and one row a cell: each model's figure, then trained against control.

    Parameters
    ----------
    task : str
        A key of `TASKS`.
    scores : mapping
        Model name → its scores; every model on the same samples in the same order. Holds `control` and `trained`.
    cells : sequence of (press name, compression ratio)
    """
    figure, difference = (found_share, found_difference) if task == "needle" else (perplexity, perplexity_difference)
    rows = [["press, evicted", *scores, "trained against control"]]
    for press, ratio in cells:
        chosen = {name: select(group, task, press, ratio) for name, group in scores.items()}
        compared = difference(chosen["trained"], chosen["control"])
        rows.append([cell_name(press, ratio), *map(figure, chosen.values()), compared])
    return rows


def select(scores: Sequence[Score], task: str, press: str, ratio: float) -> list[Score]:
    """One cell's scores on one task."""
    return [s for s in scores if (s.task, s.press, s.compression_ratio) == (task, press, ratio)]


def cell_name(press: str, ratio: float) -> str:
    """`snapkv, 50%`."""
    return "full cache" if press == NO_PRESS else f"{press}, {ratio:.0%}"


def found_share(scores: Sequence[Score]) -> str:
    """Share of exact answers, with the Wilson interval."""
    found = sum(score.exact for score in scores)
    interval = binomtest(found, len(scores)).proportion_ci(method="wilson")
    return f"{found / len(scores):.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def found_difference(scores: Sequence[Score], others: Sequence[Score]) -> str:
    """Difference of the shares in points, with the paired bootstrap interval."""
    mean, low, high = mean_interval([100.0 * (a.exact - b.exact) for a, b in zip(scores, others, strict=True)])
    return f"{mean:+.0f} points [{low:+.0f}, {high:+.0f}]"


def perplexity(scores: Sequence[Score]) -> str:
    """exp(mean nats a token), with the bootstrap interval over samples."""
    mean, low, high = (math.exp(x) for x in mean_interval([score.nll for score in scores]))
    return f"{mean:.2f} [{low:.1f}, {high:.1f}]"


def perplexity_difference(scores: Sequence[Score], others: Sequence[Score]) -> str:
    """Relative difference of the perplexities, with the paired bootstrap interval."""
    differences = [a.nll - b.nll for a, b in zip(scores, others, strict=True)]
    mean, low, high = (100 * math.expm1(x) for x in mean_interval(differences))
    return f"{mean:+.1f}% [{low:+.1f}, {high:+.1f}]"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval (percentiles, fixed draws)."""
    array = np.array(values, dtype=float)
    if np.ptp(array) == 0:  # nothing to draw from
        return array[0], array[0], array[0]
    interval = bootstrap((array,), np.mean, rng=0, method="percentile").confidence_interval
    return float(array.mean()), float(interval.low), float(interval.high)
