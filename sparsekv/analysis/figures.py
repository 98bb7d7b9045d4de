"""The pictures of an analysis, drawn with matplotlib from its files.

Each function draws on an empty figure, or a part of one, inside `sparsekv.style.paper_style`. `analysis` is the content
of attention_analysis.json, `heads` the table of attention_analysis.parquet.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from sparsekv.analysis.names import CLASSES
from sparsekv.analysis.recommend import RECENT_HOLDS, recent_distance
from sparsekv.analysis.summary import CLASS_FIGURE
from sparsekv.style import DIVERGING, RUNS, SEQUENTIAL, paper_style

Analysis = Mapping[str, Any]

TIMES = "attention / even spread, the sink apart"
FURTHEST = 16.0  # times: colours do not tell apart what is further from 1
COLOURS = {"base": RUNS["base"], "adapter": RUNS["trained"]}
UNKNOWN = "#DDDDDD"  # a class that no row holds


def draw_class_layers(figure: FigureBase, analysis: Analysis, run: str) -> None:
    """Class × layer: relative attention, colours on a log scale around 1, the same for all runs."""
    values = _numbers([analysis["layers"][run][f"{CLASS_FIGURE}.{name}"]["mean"] for name in CLASSES])
    every = _numbers(
        [layers[f"{CLASS_FIGURE}.{name}"]["mean"] for layers in analysis["layers"].values() for name in CLASSES]
    )
    furthest = min(FURTHEST, max(2.0, float(np.nanmax(np.exp(np.abs(np.log(every)))))))
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap=DIVERGING, norm=LogNorm(1 / furthest, furthest))
    axes.set_facecolor(UNKNOWN)
    axes.set(title=_title(analysis, run), xlabel="layer", yticks=range(len(CLASSES)), yticklabels=CLASSES)
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, extend="both", label=TIMES)
    _show_times(bar.ax.yaxis)


def draw_concentration(figure: FigureBase, heads: pd.DataFrame, run: str) -> None:
    """Layer × head: the share of the tokens that holds 80% of the attention; colours the same for all runs."""
    table = heads[(heads.figure == "tokens_for_80") & heads.run.isin(COLOURS)]
    values = table[table.run == run].pivot_table(index="layer", columns="head", values="mean")
    axes = figure.subplots()
    scale = Normalize(0, table["mean"].max())
    image = axes.imshow(values, aspect="auto", cmap=SEQUENTIAL, norm=scale, interpolation="nearest")
    axes.set(title=run if table.run.nunique() > 1 else "", xlabel="head", ylabel="layer")
    axes.grid(visible=False)
    label = "tokens that hold 80% of the attention"
    figure.colorbar(image, ax=axes, label=label).ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_class_bars(figure: FigureBase, analysis: Analysis) -> None:
    """Relative attention of each class, over all layers and heads, with 95% intervals."""
    axes = figure.subplots()
    runs = analysis["runs"]
    height = 0.8 / len(runs)
    for number, run in enumerate(runs):
        estimates = [analysis["overall"][run][f"{CLASS_FIGURE}.{name}"] for name in CLASSES]
        mean, low, high = (_numbers([each[key] for each in estimates]) for key in ("mean", "low", "high"))
        places = np.arange(len(CLASSES)) + (number - (len(runs) - 1) / 2) * height
        spread = np.nan_to_num(np.stack([mean - np.maximum(low, mean / 100), high - mean]))  # the axis has no 0
        axes.barh(places, mean - 1, height, left=1, xerr=spread, color=COLOURS[run], label=run, ecolor="#333333")
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set(xscale="log", xlabel=TIMES)
    axes.set(yticks=range(len(CLASSES)), yticklabels=[_class_label(analysis, name) for name in CLASSES])
    axes.invert_yaxis()
    _show_times(axes.xaxis)
    _legend(axes, runs)


def draw_distance(figure: FigureBase, analysis: Analysis) -> None:
    """Attention off the sink by distance: its density a token with 95% intervals, and where 80% of it ends."""
    axes = figure.subplots()
    first = next(iter(analysis["overall"].values()))
    starts = np.array(sorted(int(name.split(".")[1]) for name in first if name.startswith("distance_share.")))
    ends = np.append(starts[1:], analysis["max_len"])
    for run in analysis["runs"]:
        estimates = [analysis["overall"][run][f"distance_share.{start}"] for start in starts]
        mean, low, high = (
            _numbers([each[key] for each in estimates]) / (ends - starts) for key in ("mean", "low", "high")
        )
        middle = (starts + ends + 1) / 2  # of the tokens' places, counted from 1
        axes.plot(middle, mean, marker="o", color=COLOURS[run], label=run)
        axes.fill_between(middle, low, high, color=COLOURS[run], alpha=0.25, linewidth=0)
        holds = recent_distance(analysis["overall"][run])
        axes.axvline(holds, color=COLOURS[run], linestyle=":")
        where = axes.get_xaxis_transform()  # x in tokens, y in shares of the height
        said = f"{RECENT_HOLDS:.0%} within {holds}"
        axes.text(holds, 0.98, said, transform=where, rotation=90, va="top", ha="right", fontsize=7, color=COLOURS[run])
    axes.set(xscale="log", yscale="log", xlabel="tokens back, the query itself being 1")
    axes.set_ylabel("share of the attention off the sink, a token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}%"))
    _legend(axes, analysis["runs"])


def draw_all(analysis: Analysis, heads: pd.DataFrame) -> dict[str, bytes]:
    """Name of a figure → PNG; with an adapter, before and after stand beside each other."""
    runs = analysis["runs"]
    pictures = {}
    with paper_style():
        for name, draw, source in (
            ("class_layers", draw_class_layers, analysis),
            ("concentration", draw_concentration, heads),
        ):
            figure = Figure((4.2 * len(runs), 2.6 if name == "class_layers" else 3.6))
            for part, run in zip(figure.subfigures(1, len(runs), squeeze=False).flat, runs, strict=True):
                draw(part, source, run)
            pictures[name] = _png(figure)
        for name, draw_runs in (("class_bars", draw_class_bars), ("distance", draw_distance)):
            figure = Figure((4.2, 3.0))
            draw_runs(figure, analysis)
            pictures[name] = _png(figure)
    return pictures


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _numbers(values: Any) -> np.ndarray:
    """JSON's null becomes NaN."""
    return np.array(values, dtype=np.float64)


def _title(analysis: Analysis, run: str) -> str:
    return run if len(analysis["runs"]) > 1 else ""


def _class_label(analysis: Analysis, name: str) -> str:
    return f"{name}\n{analysis['token_shares'][name]:.1%} of tokens"


def _show_times(axis: Axis) -> None:
    """Ticks at 1/2×, 1×, 2×, …"""
    axis.set_major_locator(LogLocator(2))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×" if value >= 1 else f"1/{1 / value:g}×"))


def _legend(axes: Axes, runs: list[str]) -> None:
    if len(runs) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(runs))
