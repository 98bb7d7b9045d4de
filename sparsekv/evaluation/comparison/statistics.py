"""Intervals and p-values for the means of many cells at once.

Every cell of a benchmark is scored on the same rows. So one set of resampled rows serves all cells: the mean of each
resample is one matrix product, and whatever is made of means (ratios, paired differences, averages over tasks) is made
of their resampled means in the same way, which keeps the pairing. Rows that ask about one context are alike, so
contexts are resampled, each with all of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 4_999
FLIPS = 19_999  # the smallest p-value is 1 / 20,000; of larger families, see `flips_for`
SMALLEST = 0.01  # what Holm may make of the smallest p-value: well below any level of significance
BLOCK = 4_000_000  # weights held at once: 32 MB


@dataclass(frozen=True)
class Sampled:
    """A statistic of each cell, and the same statistic on resampled rows.

    Parameters
    ----------
    value : float64[cells]
    draws : float64[draws, cells]
    """

    value: Floats
    draws: Floats

    def take(self, cells: Sequence[int]) -> Sampled:
        """The statistic of these cells, in this order."""
        return Sampled(self.value[cells], self.draws[:, cells])

    def map(self, function: Callable[..., Floats], *others: Sampled) -> Sampled:
        """`function` of this statistic and the others, cell by cell; a single cell stands for all of them."""
        draws = function(self.draws, *(other.draws for other in others))
        return Sampled(function(self.value, *(other.value for other in others)), draws)

    def __sub__(self, other: Sampled) -> Sampled:
        return self.map(np.subtract, other)

    def mean(self) -> Sampled:
        """The mean over cells, as one cell."""
        return self.map(lambda cells: cells.mean(axis=-1, keepdims=True))


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task, or paired differences of scores, as they are drawn.

    Parameters
    ----------
    sums : float64[contexts, cells]
        Over the rows of a context, which are the same questions in every cell.
    sizes : float64[contexts]
        Rows of each.
    seed : int
        Of the draws; the same for whatever shall stay paired.
    """

    sums: Floats
    sizes: Floats
    seed: int

    def take(self, cells: Sequence[int]) -> TaskScores:
        """The scores of these cells, in this order."""
        return replace(self, sums=self.sums[:, cells])

    def __sub__(self, other: TaskScores) -> TaskScores:
        return replace(self, sums=self.sums - other.sums)

    def mean(self) -> Floats:
        """Over rows: float64[cells]."""
        mean: Floats = self.sums.sum(axis=0) / self.sizes.sum()
        return mean


def by_context(values: Floats, contexts: NDArray[np.intp], number: int, seed: int) -> TaskScores:
    """Scores as they are drawn: float64[rows, cells], the context of each row, and how many contexts there are."""
    sums = np.zeros_like(values, shape=(number, values.shape[1]))
    np.add.at(sums, contexts, values)
    return TaskScores(sums, np.bincount(contexts, minlength=number).astype(np.float64), seed)


def bootstrap_means(scores: TaskScores) -> Sampled:
    """Means over rows, and those of contexts drawn with replacement.

    Returns
    -------
    Sampled
        Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979); of contexts with
        several rows the pairs cluster bootstrap: Cameron, Gelbach and Miller, "Bootstrap-based improvements for
        inference with clustered errors", Review of Economics and Statistics 90 (2008). A draw without any row is NaN.
    """
    rng, number = np.random.default_rng(scores.seed), len(scores.sums)

    def means(draws: int) -> Floats:
        drawn = rng.integers(number, size=(draws, number)) + number * np.arange(draws)[:, None]
        counted = np.bincount(drawn.ravel(), minlength=draws * number).astype(np.float64).reshape(draws, number)
        with np.errstate(invalid="ignore"):
            drawn_means: Floats = counted @ scores.sums / (counted @ scores.sizes)[:, None]
        return drawn_means

    return Sampled(scores.mean(), _in_blocks(means, DRAWS, number))


def sign_flipped_means(scores: TaskScores, rng: np.random.Generator, flips: int) -> Floats:
    """Means after the sign of each context's rows was drawn anew; of differences, what chance alone would give.

    Returns
    -------
    float64[flips, cells]
        Canay, Romano and Shaikh, "Randomization tests under an approximate symmetry assumption", Econometrica 85
        (2017).
    """

    def means(size: int) -> Floats:
        signs = (rng.integers(2, size=(size, len(scores.sums)), dtype=np.int8) * 2 - 1).astype(np.float64)
        product: Floats = signs @ scores.sums
        return product / scores.sizes.sum()

    return _in_blocks(means, flips, len(scores.sums))


def _in_blocks(means: Callable[[int], Floats], count: int, weights: int) -> Floats:
    """`means` of `count` draws of so many weights each, a block at a time: float64[count, cells]."""
    return np.concatenate([means(size) for size in _parts(count, max(1, BLOCK // weights))])


def _parts(count: int, most: int) -> list[int]:
    """`count` in parts of at most so many."""
    return [min(most, count - start) for start in range(0, count, most)]


def average(strata: Sequence[Sampled]) -> Sampled:
    """Unweighted mean over tasks, each resampled on its own (stratified bootstrap), or with others by the same seed."""
    first, *rest = strata
    return first.map(lambda *arrays: sum(arrays[1:], arrays[0]) / len(arrays), *rest)


def ratio(numerator: Sampled, denominator: Sampled) -> Sampled:
    """Quotient of two paired statistics; undefined (NaN) where the denominator is not positive.

    A resample whose denominator is not positive counts as infinite, so that many of them leave no interval rather
    than a narrow one.
    """
    value = np.where(denominator.value > 0, _divide(numerator.value, denominator.value), np.nan)
    return Sampled(value, _divide(numerator.draws, denominator.draws))


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator <= 0, np.copysign(np.inf, numerator), numerator / denominator)  # NaN stays NaN


def interval(sampled: Sampled) -> tuple[Floats, Floats]:
    """Percentile bootstrap interval (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

    Returns
    -------
    (float64[cells], float64[cells])
        Lower and upper bound at `CONFIDENCE`. NaN where there is nothing to draw from (one context, or all scores
        equal) and where the statistic or a bound is not finite.
    """
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(sampled.draws, [tail, 1 - tail], axis=0)
        spread = np.ptp(sampled.draws, axis=0) > 1e-9 * np.maximum(1.0, np.abs(sampled.value))
    # An infinite draw beyond the bounds makes the spread infinite, which is a spread; inf - inf is none.
    known = spread & np.isfinite(sampled.value) & np.isfinite(low) & np.isfinite(high)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def flips_for(family: int) -> int:
    """Sign flips for p-values of which at most `family` are adjusted together.

    The smallest p-value is 1 / (1 + flips), and `holm` takes it times their number. A multiple of `FLIPS` + 1, less the
    one that `p_values` adds, so that the product is at most `SMALLEST`.
    """
    return max(1, math.ceil(family / (SMALLEST * (FLIPS + 1)))) * (FLIPS + 1) - 1


def p_values(tasks: Sequence[TaskScores], flips: int = FLIPS) -> Floats:
    """Two-sided p-value of a mean difference of 0, by sign flips.

    Parameters
    ----------
    tasks : sequence of TaskScores
        Paired differences. Of several tasks it is of the unweighted mean over them, flipped as `average` says.
    flips : int
        From `flips_for`. `FLIPS` + 1 are held at once, however many there are.

    Returns
    -------
    float64[cells]
        (1 + flips as far from 0 as the mean itself) / (1 + flips): Fisher, "The Design of Experiments", 1935, section
        21; the ones are those of Phipson and Smyth, "Permutation p-values should never be zero", 2010. 1 where all
        differences are 0.
    """
    size = np.abs(sum(task.mean() for task in tasks) / len(tasks))
    least = size - 1e-9 * np.maximum(1.0, size)  # ties come with rounding errors
    generators = [np.random.default_rng(task.seed) for task in tasks]
    as_far = np.ones(len(size))
    for part in _parts(flips, FLIPS + 1):
        drawn = sum(sign_flipped_means(task, rng, part) for task, rng in zip(tasks, generators, strict=True))
        as_far += (np.abs(drawn / len(tasks)) >= least).sum(axis=0)
    return as_far / (1 + flips)


def holm(p: Floats) -> Floats:
    """p-values adjusted for their number; NaN stays NaN and does not count.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979): the
    k-th smallest of m times (m - k + 1), never below a smaller one's, at most 1.
    """
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted
