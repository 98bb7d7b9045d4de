"""The pictures of an analysis show its numbers."""

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from sparsekv.analysis.columns import CLASSES
from sparsekv.analysis.figures import (
    COLOURS,
    draw_all,
    draw_class_bars,
    draw_class_layers,
    draw_concentration,
    draw_distance,
)
from sparsekv.analysis.recommend import recent_distance
from sparsekv.analysis.rows import distances

LAYERS, HEADS, MAX_LEN = 3, 4, 64


def estimate(mean) -> dict:
    mean = np.asarray(mean)
    return {"mean": mean.tolist(), "low": (mean * 0.9).tolist(), "high": (mean * 1.1).tolist()}


def make(runs: list[str]) -> tuple[dict, pd.DataFrame]:
    """An analysis and its heads; no row holds a number."""
    draw = np.random.default_rng(0)
    overall, layers, tables = {}, {}, []
    for run in runs:
        relative = {f"relative_off_sink.{name}": draw.uniform(0.3, 3, LAYERS) for name in CLASSES}
        layers[run] = {name: estimate(values) for name, values in relative.items()}
        layers[run]["relative_off_sink.number"] = dict.fromkeys(("mean", "low", "high"), [None] * LAYERS)
        overall[run] = {name: estimate(values.mean()) for name, values in relative.items()}
        overall[run]["relative_off_sink.number"] = dict.fromkeys(("mean", "low", "high"))
        shares = draw.dirichlet(np.ones(len(distances(MAX_LEN))))
        overall[run] |= {
            f"distance_share.{start}": estimate(share) for start, share in zip(distances(MAX_LEN), shares, strict=True)
        }
        index = pd.MultiIndex.from_product([[run], range(LAYERS), range(HEADS), ["tokens_for_80", "support"]])
        table = pd.DataFrame(index=index.set_names(["run", "layer", "head", "figure"])).reset_index()
        tables.append(table.assign(mean=draw.uniform(0, 0.5, len(table))))
    analysis = {"runs": runs, "max_len": MAX_LEN, "overall": overall, "layers": layers}
    return analysis | {"token_shares": dict.fromkeys(CLASSES, 1 / 6)}, pd.concat(tables, ignore_index=True)


@pytest.fixture(params=[["base"], ["base", "adapter"]], ids=["alone", "before and after"])
def both(request) -> tuple[dict, pd.DataFrame]:
    return make(request.param)


def image_of(figure: Figure):
    return figure.axes[0].images[0]


def test_class_layers(both):
    analysis, _ = both
    limits = set()
    for run in analysis["runs"]:
        figure = Figure()
        draw_class_layers(figure, analysis, run)
        shown = image_of(figure).get_array()
        for row, name in enumerate(CLASSES):
            wanted = analysis["layers"][run][f"relative_off_sink.{name}"]["mean"]
            assert list(shown[row].filled(-1)) == [-1 if value is None else value for value in wanted]
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(CLASSES)
        low, high = image_of(figure).get_clim()
        assert low * high == pytest.approx(1), "1 is in the middle of the colours"
        limits.add((low, high))
    assert len(limits) == 1, "runs can be compared by eye"


def test_concentration(both):
    analysis, heads = both
    limits = set()
    for run in analysis["runs"]:
        figure = Figure()
        draw_concentration(figure, heads, run)
        wanted = heads[(heads.run == run) & (heads.figure == "tokens_for_80")]
        assert image_of(figure).get_array()[2, 1] == wanted[(wanted.layer == 2) & (wanted["head"] == 1)]["mean"].item()
        limits.add(image_of(figure).get_clim())
    assert len(limits) == 1


def test_class_bars(both):
    analysis, _ = both
    figure = Figure()
    draw_class_bars(figure, analysis)
    (axes,) = figure.axes
    ends = {round(bar.get_x() + bar.get_width(), 9) for bar in axes.patches if not np.isnan(bar.get_width())}
    for run, name in itertools.product(analysis["runs"], CLASSES):
        wanted = analysis["overall"][run][f"relative_off_sink.{name}"]["mean"]
        assert wanted is None or round(wanted, 9) in ends, name
    assert axes.get_legend_handles_labels()[1] == analysis["runs"]


def test_distance(both):
    analysis, _ = both
    figure = Figure()
    draw_distance(figure, analysis)
    (axes,) = figure.axes
    starts = distances(MAX_LEN)
    for run in analysis["runs"]:
        (line,) = [line for line in axes.lines if line.get_label() == run]
        widths = np.diff([*starts, MAX_LEN])
        shares = [analysis["overall"][run][f"distance_share.{start}"]["mean"] for start in starts]
        assert line.get_ydata() * widths == pytest.approx(shares)
        assert any(text.get_text() == f"80% within {recent_distance(analysis['overall'][run])}" for text in axes.texts)
        assert line.get_color() == COLOURS[run]


def test_all_pictures(both):
    analysis, heads = both
    pictures = draw_all(analysis, heads)
    assert set(pictures) == {"class_layers", "concentration", "class_bars", "distance"}
    for name, png in pictures.items():
        picture = imread(io.BytesIO(png))
        assert picture[..., :3].std() > 0.05, f"{name} is empty"
    alone, _ = imread(io.BytesIO(draw_all(*make(["base"]))["class_layers"])).shape[1::-1]
    assert imread(io.BytesIO(pictures["class_layers"])).shape[1] == alone * len(analysis["runs"])
    assert draw_all(analysis, heads) == pictures, "the same numbers give the same file"
