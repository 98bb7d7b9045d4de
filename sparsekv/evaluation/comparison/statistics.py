"""Intervals and p-values for the means of many cells at once.

Every cell of a benchmark is scored on the same rows. So one set of resampled rows serves all cells: the mean of each
resample is one matrix product, and whatever is made of means (ratios, paired differences, averages over tasks) is made
of their resampled means in the same way, which keeps the pairing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 4_999
FLIPS = 19_999  # the smallest p-value is 1 / 20,000: small enough for Holm over some hundred cells
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


def bootstrap_means(values: Floats, seed: int) -> Sampled:
    """Column means, and those of rows drawn with replacement.

    Parameters
    ----------
    values : float64[rows, cells]
        Scores of one task; row i of every cell is the same question.
    seed : int
        Of the draws; the same for whatever shall stay paired.

    Returns
    -------
    Sampled
        Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    rows = len(values)

    def counts(rng: np.random.Generator, draws: int) -> Floats:
        drawn = rng.integers(rows, size=(draws, rows)) + rows * np.arange(draws)[:, None]
        counted: Floats = np.bincount(drawn.ravel(), minlength=draws * rows).astype(np.float64)
        return counted.reshape(draws, rows)

    return Sampled(values.mean(axis=0), _weighted_means(values, counts, DRAWS, seed))


def sign_flipped_means(values: Floats, seed: int) -> Sampled:
    """Column means, and those after each row's sign was drawn anew; of differences: what chance alone would give.

    Parameters
    ----------
    values : float64[rows, cells]
        Paired differences, or two groups of columns whose means are subtracted afterwards: both give the same.
    seed : int
    """

    def signs(rng: np.random.Generator, flips: int) -> Floats:
        return (rng.integers(2, size=(flips, len(values)), dtype=np.int8) * 2 - 1).astype(np.float64)

    return Sampled(values.mean(axis=0), _weighted_means(values, signs, FLIPS, seed))


def _weighted_means(
    values: Floats, weights: Callable[[np.random.Generator, int], Floats], count: int, seed: int
) -> Floats:
    """`weights(rng, k) @ values / rows` for `count` weightings, a block at a time: float64[count, cells]."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // len(values))
    sizes = [min(block, count - start) for start in range(0, count, block)]
    return np.concatenate([weights(rng, size) @ values for size in sizes]) / len(values)


def average(strata: Sequence[Sampled]) -> Sampled:
    """Unweighted mean over tasks, each resampled on its own (stratified bootstrap, stratified sign flips)."""
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
        return np.where(denominator > 0, numerator / denominator, np.copysign(np.inf, numerator))


def interval(sampled: Sampled) -> tuple[Floats, Floats]:
    """Percentile bootstrap interval (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

    Returns
    -------
    (float64[cells], float64[cells])
        Lower and upper bound at `CONFIDENCE`. NaN where there is nothing to draw from (one row, or all scores equal)
        and where the statistic or a bound is not finite.
    """
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(sampled.draws, [tail, 1 - tail], axis=0)
        spread = np.ptp(sampled.draws, axis=0) > 1e-9 * np.maximum(1.0, np.abs(sampled.value))
    # An infinite draw beyond the bounds makes the spread infinite, which is a spread; inf - inf is none.
    known = spread & np.isfinite(sampled.value) & np.isfinite(low) & np.isfinite(high)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def p_values(flipped: Sampled) -> Floats:
    """Two-sided p-value of a mean difference of 0, by sign flips.

    Parameters
    ----------
    flipped : Sampled
        From `sign_flipped_means`, of differences.

    Returns
    -------
    float64[cells]
        (1 + flips as far from 0 as the mean itself) / (1 + flips): Fisher, "The Design of Experiments", 1935, section
        21; the ones are those of Phipson and Smyth, "Permutation p-values should never be zero", 2010. 1 where all
        differences are 0.
    """
    size = np.abs(flipped.value)
    as_far = np.abs(flipped.draws) >= size - 1e-9 * np.maximum(1.0, size)  # ties come with rounding errors
    return (1 + as_far.sum(axis=0)) / (1 + len(flipped.draws))


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
