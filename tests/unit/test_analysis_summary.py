"""Means and intervals over samples, and the tables made of them."""

import numpy as np
import pytest
from scipy import stats

from sparsekv.analysis.columns import CLASSES
from sparsekv.analysis.samples import Samples
from sparsekv.analysis.summary import Estimate, by_run, head_table, of_layers, overall, token_shares

DRAW = np.random.default_rng(0)
N, LAYERS, HEADS, S = 6, 2, 3, 4


def make_samples(runs: int = 2) -> Samples:
    figures = DRAW.normal(5, 1, (N, runs, LAYERS, HEADS, S)).astype(np.float32)
    classes = DRAW.integers(0, 6, (N, 50)).astype(np.uint8)
    return Samples(figures, classes, classes < 2)


def wanted(values: np.ndarray) -> tuple[float, float, float]:
    """By scipy's own interval."""
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return values.mean(), low, high


def test_the_interval_is_students():
    values = DRAW.normal(2, 3, (N, 5))
    estimate = Estimate.of(values)
    for column in range(5):
        found = estimate.mean[column], estimate.low[column], estimate.high[column]
        assert found == pytest.approx(wanted(values[:, column]))


def test_samples_without_the_figure_are_left_out():
    values = DRAW.normal(2, 3, (N, 3))
    values[[1, 4], 0] = np.nan
    values[1:, 1] = np.nan
    values[:, 2] = np.nan
    estimate = Estimate.of(values)
    assert (estimate.mean[0], estimate.low[0], estimate.high[0]) == pytest.approx(wanted(values[[0, 2, 3, 5], 0]))
    assert estimate.as_json(1) == {"mean": float(f"{values[0, 1]:.6g}"), "low": None, "high": None}
    assert estimate.as_json(2) == {"mean": None, "low": None, "high": None}


def test_json_holds_no_nan_in_lists():
    estimate = Estimate.of(np.array([[[1.0, 2.0], [np.nan, 2.0]], [[3.0, 2.0], [np.nan, 2.0]]]))
    assert estimate.as_json(0)["mean"] == [2.0, None]
    assert estimate.as_json(1) == {"mean": [2.0, 2.0], "low": [2.0, 2.0], "high": [2.0, 2.0]}


def test_heads_are_averaged_before_the_interval():
    samples = make_samples(1)
    figures = by_run(samples, ["base"])
    assert set(figures) == {"base"}
    per_sample = samples.figures[:, 0].astype(np.float64)
    model, layers = overall(figures["base"]), of_layers(figures["base"])
    for figure in range(S):
        found = model.mean[figure], model.low[figure], model.high[figure]
        assert found == pytest.approx(wanted(per_sample[..., figure].mean((1, 2))))
        assert layers.mean.shape == (LAYERS, S)
        found = layers.mean[1, figure], layers.low[1, figure], layers.high[1, figure]
        assert found == pytest.approx(wanted(per_sample[:, 1, :, figure].mean(1)))


def test_heads_without_the_figure_are_left_out():
    """All attention of a head on the sink leaves it no distances: the others still have theirs."""
    samples = make_samples(1)
    samples.figures[:, 0, 1, 2, 0] = np.nan
    samples.figures[:, 0, 0, :, 1] = np.nan
    figures = by_run(samples, ["base"])["base"]
    assert of_layers(figures).mean[1, 0] == pytest.approx(samples.figures[:, 0, 1, :2, 0].mean())
    assert np.isnan(of_layers(figures).mean[0, 1])
    assert overall(figures).mean[1] == pytest.approx(samples.figures[:, 0, 1, :, 1].mean())
    assert not np.isnan(overall(figures).low).any()


def test_differences_are_paired():
    """A constant shift of every sample is known exactly, however much samples vary."""
    samples = make_samples()
    samples.figures[:, 1] = samples.figures[:, 0] + 0.1
    figures = by_run(samples, ["base", "adapter"])
    difference = overall(figures["difference"])
    assert difference.low == pytest.approx([0.1] * S, abs=1e-5)
    assert difference.high == pytest.approx([0.1] * S, abs=1e-5)
    assert (overall(figures["adapter"]).low < overall(figures["base"]).high).all()


def test_every_head_has_its_row():
    samples = make_samples()
    names = ["a", "b", "c", "d"]
    table = head_table(by_run(samples, ["base", "adapter"]), names)
    assert list(table.columns) == ["run", "layer", "head", "figure", "mean", "low", "high"]
    assert len(table) == 3 * LAYERS * HEADS * S
    row = table.set_index(["run", "layer", "head", "figure"]).loc[("adapter", 1, 2, "c")]
    assert tuple(row) == pytest.approx(wanted(samples.figures[:, 1, 1, 2, 2]), rel=1e-5)


def test_shares_of_tokens():
    samples = make_samples()
    shares = token_shares(samples)
    assert sum(shares[name] for name in CLASSES) == pytest.approx(1)
    assert shares["number"] == (samples.classes == 2).sum() / samples.classes.size
    assert shares["static_anchors"] == pytest.approx(shares["special"] + shares["punctuation"])
