"""From the figures of single samples to means with intervals: of every head, every layer, and the whole model.

A layer's figure of one sample is the mean over its heads, the model's the mean over layers and heads, of those in which
it has a meaning; the interval is over samples. Differences between adapter and base are taken row by row before
anything is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from sparsekv.analysis.names import CLASSES

if TYPE_CHECKING:
    from sparsekv.analysis.samples import Samples

CONFIDENCE = 0.95
DIFFERENCE = "difference"  # adapter − base
CLASS_FIGURE = "relative_off_sink"  # what classes are compared by: the sink is a place, whatever stands there


@dataclass(frozen=True)
class Estimate:
    """Means and the bounds of their 95% intervals, Float64[...] each; NaN where a figure has no meaning.

    The interval is Student's t: mean ± t(n − 1) · s/√n, over the samples in which the figure has a meaning; bounds are
    NaN where that is one sample.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray) -> Estimate:
        """Over the first axis of Float[n, ...]."""
        known = ~np.isnan(samples)
        n, mean = known.sum(0), _mean(samples, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = (np.where(known, samples - mean, 0) ** 2).sum(0) / (n - 1)
            half = stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(n - 1, 1)) * np.sqrt(variance / n)
        half = np.where(n > 1, half, np.nan)
        return cls(mean, mean - half, mean + half)

    def as_json(self, figure: int) -> dict[str, Any]:
        """One figure, the last axis: mean, low and high, each a number or a list; null for NaN; 6 digits."""
        return {name: _rounded(getattr(self, name)[..., figure].tolist()) for name in ("mean", "low", "high")}


def by_run(samples: Samples, runs: Sequence[str]) -> dict[str, np.ndarray]:
    """Run → Float[n, layers, H, S]; and the differences where there are two runs."""
    figures = {name: samples.figures[:, number] for number, name in enumerate(runs)}
    if len(runs) == 2:
        figures[DIFFERENCE] = figures[runs[1]] - figures[runs[0]]
    return figures


def overall(figures: np.ndarray) -> Estimate:
    """Of the model, [S], from Float[n, layers, H, S]."""
    return Estimate.of(_mean(figures, (1, 2)))


def of_layers(figures: np.ndarray) -> Estimate:
    """Of each layer, [layers, S], from Float[n, layers, H, S]."""
    return Estimate.of(_mean(figures, 2))


def head_table(figures: dict[str, np.ndarray], names: Sequence[str]) -> pd.DataFrame:
    """One row a run × layer × head × figure: columns run, layer, head, figure, mean, low, high."""
    tables = []
    for run, values in figures.items():
        estimate = Estimate.of(values)
        index = pd.MultiIndex.from_product(
            [[run], *(range(size) for size in estimate.mean.shape[:2]), names], names=["run", "layer", "head", "figure"]
        )
        columns = {name: getattr(estimate, name).ravel() for name in ("mean", "low", "high")}
        tables.append(pd.DataFrame(columns, index=index).reset_index())
    floats = dict.fromkeys(("mean", "low", "high"), np.float32)
    return pd.concat(tables, ignore_index=True).astype(floats)


def token_shares(samples: Samples) -> dict[str, float]:
    """Share of each class in the rows, and of static anchors (by their token alone)."""
    shares = {name: float((samples.classes == number).mean()) for number, name in enumerate(CLASSES)}
    return shares | {"static_anchors": float(samples.static_anchors.mean())}


def _mean(values: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """Float64, of the values that have a meaning; NaN where none has."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axes, dtype=np.float64) / known.sum(axes)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return None if np.isnan(value) else float(f"{value:.6g}")
