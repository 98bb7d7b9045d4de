"""What the model attends to, from `sparsekv analyze`; with an adapter, before and after beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sparsekv.analysis import figures
from sparsekv.analysis.names import ANALYSIS, CLASSES, HEADS
from sparsekv.analysis.recommend import RECENT_HOLDS, recent_distance
from sparsekv.analysis.summary import CLASS_FIGURE
from sparsekv.analysis.tables import sentences
from sparsekv.report.cells import file_stem
from sparsekv.report.chart import Chart, Section
from sparsekv.report.collect import AttentionAnalysis, Evidence
from sparsekv.report.look import add_colour_bar, page_figure, panel_axes, panels, translucent
from sparsekv.style import DIVERGING, MARKERS, SEQUENTIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure as PaperFigure
    from matplotlib.figure import FigureBase

TITLE = "Attention"
INTERVAL = "Intervals are 95%, over rows of text."
SHAPES = {"base": MARKERS["base"], "adapter": MARKERS["trained"]}
ESTIMATE = ["mean", "low", "high"]
TICKS = [2.0**power for power in range(-4, 7)]


def build(evidence: Evidence) -> Section:
    """The charts of every analysis, and what they say together."""
    if not evidence.attention:
        return Section("attention", TITLE, missing="No analysis here: `sparsekv analyze --output_dir DIR` makes one.")
    several = len(evidence.attention) > 1
    charts, said = [], []
    for each in evidence.attention:
        made = [make(each, file_stem(name, each.folder.name if several else "")) for name, make in CHARTS.items()]
        charts += [replace(chart, title=f"{chart.title}: {each.folder}") if several else chart for chart in made]
        measured = f"{each.analysis['num_samples']} rows of {each.analysis['max_len']} tokens"
        said.append(f"{each.folder}: {measured}" if several else f"Measured on {measured}")
        said += [sentence[0].upper() + sentence[1:] for sentence in sentences(each.analysis)]
    return Section("attention", TITLE, ". ".join(said) + ".", charts)


def class_bars(each: AttentionAnalysis, name: str) -> Chart:
    """Relative attention of each class, over all layers and heads."""
    analysis = each.analysis
    rows = [
        {"run": run, "class": kind, "share_of_tokens": analysis["token_shares"][kind]}
        | {"share_of_attention": analysis["overall"][run][f"share.{kind}"]["mean"]}
        | analysis["overall"][run][f"{CLASS_FIGURE}.{kind}"]
        for run in analysis["runs"]
        for kind in CLASSES
    ]
    data = pd.DataFrame(rows).astype(dict.fromkeys(ESTIMATE, float)).dropna(subset="mean")
    page = page_figure(height=110 + 55 * len(CLASSES), barmode="group", bargap=0.3)
    for run, group in data.groupby("run", sort=False):
        colour = figures.COLOURS[str(run)]
        lowest = group.low.clip(lower=group["mean"] / 100)  # the axis has no 0
        bar = go.Bar(
            y=[f"{row[0]}<br>{row[1]:.1%} of tokens" for row in group[["class", "share_of_tokens"]].to_numpy()],
            x=group["mean"] - 1,
            base=1,
            orientation="h",
            name=str(run),
            marker={"color": translucent(colour, 0.5)},
            error_x={"array": group.high - group["mean"], "arrayminus": group["mean"] - lowest, "color": colour},
            customdata=group[[*ESTIMATE, "share_of_attention"]],
            hovertemplate="%{customdata[0]:.3g} × (%{customdata[1]:.3g} … %{customdata[2]:.3g})<br>"
            "%{customdata[3]:.1%} of the attention<extra>%{fullData.name}</extra>",
        )
        page.add_trace(bar)
    page.update_layout(showlegend=len(analysis["runs"]) > 1)
    furthest = [max(data.low.min(), data["mean"].min() / 2), data.high.max()]  # an interval may well reach to 0
    page.update_xaxes(type="log", title="× an even share", range=np.log10(furthest), tickvals=TICKS)
    page.update_yaxes(autorange="reversed")
    caption = (
        "Attention that a class receives, divided by what its tokens would receive if every query spread its attention "
        "evenly over the tokens it sees: 1× is no preference. The sink (the first tokens) is left out: it is attended "
        f"to whatever stands there. Mean over layers and heads. {INTERVAL}"
    )
    draw = _beside([""], lambda part, _: figures.draw_class_bars(part, analysis), 3.0)
    return Chart(name, "Attention by class of token", caption, (each.folder / ANALYSIS,), data, page, draw)


def class_layers(each: AttentionAnalysis, name: str) -> Chart:
    """Relative attention of each class in each layer."""
    layers = each.analysis["layers"]
    tables = [
        pd.DataFrame(layers[run][f"{CLASS_FIGURE}.{kind}"], dtype=float).rename_axis("layer").reset_index()
        for run in each.analysis["runs"]
        for kind in CLASSES
    ]
    keys = [(run, kind) for run in each.analysis["runs"] for kind in CLASSES]
    data = pd.concat(tables, keys=keys, names=["run", "class"]).droplevel(2).reset_index()
    furthest = min(figures.FURTHEST, max(2.0, float(np.exp(np.log(data["mean"]).abs().max()))))
    ticks = TICKS[::2] if furthest > 4 else TICKS
    colours = {"colorscale": DIVERGING, "cmin": -np.log2(furthest), "cmax": np.log2(furthest)}

    def cells(table: pd.DataFrame) -> go.Heatmap:
        grid = table.pivot_table(index="class", columns="layer", values="mean", sort=False, dropna=False)
        return go.Heatmap(
            z=np.log2(grid), x=grid.columns, y=grid.index, customdata=grid, coloraxis="coloraxis",
            hovertemplate="%{y}, layer %{x}: %{customdata:.3g} ×<extra></extra>",
        )  # fmt: skip

    page = _maps(each, data, cells, "layer", "", colours)
    add_colour_bar(page, figures.TIMES, tickvals=np.log2(ticks), ticktext=[f"{times:.3g}×" for times in ticks])
    caption = (
        "The same ratio by layer, as the mean over its heads. Purple: more than an even share; orange: less. Colours "
        f"end at {furthest:.3g}× and its inverse."
    )
    draw = _beside(each.analysis["runs"], lambda part, run: figures.draw_class_layers(part, each.analysis, run), 2.6)
    return Chart(name, "Attention by class and layer", caption, (each.folder / ANALYSIS,), data, page, draw)


def concentration(each: AttentionAnalysis, name: str) -> Chart:
    """Share of the tokens that holds 80% of the attention, head by head."""
    wanted = (each.heads.figure == "tokens_for_80") & each.heads.run.isin(each.analysis["runs"])
    data = each.heads.loc[wanted, ["run", "layer", "head", *ESTIMATE]].reset_index(drop=True)
    colours = {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": data["mean"].max()}

    def cells(table: pd.DataFrame) -> go.Heatmap:
        grid = table.pivot_table(index="layer", columns="head", values="mean")
        return go.Heatmap(
            z=grid, x=grid.columns, y=grid.index, coloraxis="coloraxis",
            hovertemplate="layer %{y}, head %{x}: %{z:.1%} of the tokens<extra></extra>",
        )  # fmt: skip

    page = _maps(each, data, cells, "head", "layer", colours)
    add_colour_bar(page, "tokens that hold 80% of the attention", tickformat=".0%")
    caption = (
        "For each query head, the smallest share of a row's tokens that holds 80% of the attention of the row's second "
        "half: what a cache that is evicted once could live on. Dark heads need few tokens."
    )
    draw = _beside(each.analysis["runs"], lambda part, run: figures.draw_concentration(part, each.heads, run), 3.6)
    return Chart(name, "How few tokens a head attends to", caption, (each.folder / HEADS,), data, page, draw)


def distance(each: AttentionAnalysis, name: str) -> Chart:
    """Attention off the sink by distance to the query."""
    first, *_ = each.analysis["overall"].values()
    starts = sorted(int(figure.rpartition(".")[2]) for figure in first if figure.startswith("distance_share."))
    rows = [
        {"run": run, "from": start, "to": end - 1, **each.analysis["overall"][run][f"distance_share.{start}"]}
        for run in each.analysis["runs"]
        for start, end in zip(starts, [*starts[1:], each.analysis["max_len"]], strict=True)
    ]
    data = pd.DataFrame(rows).astype(dict.fromkeys(ESTIMATE, float))
    page = page_figure(showlegend=len(each.analysis["runs"]) > 1)
    for run, group in data.groupby("run", sort=False):
        tokens = group.to - group["from"] + 1
        per_token = group[ESTIMATE].div(tokens, axis=0)
        middle = (group["from"] + group.to) / 2 + 1
        hover = "%{customdata[0]} … %{customdata[1]} tokens back: %{customdata[2]:.2%}<extra>%{fullData.name}</extra>"
        shown = group[["from", "to", "mean"]]
        page.add_traces(_band(str(run), middle, per_token, customdata=shown, hovertemplate=hover))
    page.update_xaxes(type="log", title="tokens back, the query itself being 1", dtick=1)
    page.update_yaxes(type="log", title="share of attention, a token", tickformat=".2~%", dtick=1)
    ranges = [f"{recent_distance(each.analysis['overall'][run])} tokens ({run})" for run in each.analysis["runs"]]
    near = f"{RECENT_HOLDS:.0%} of it lies within {', '.join(ranges)}"
    caption = (
        "Where queries of a row's second half look, apart from the sink: the attention on each range of distances, "
        f"divided by the number of tokens there. {near}. Mean over layers and heads. {INTERVAL}"
    )
    draw = _beside([""], lambda part, _: figures.draw_distance(part, each.analysis), 3.0)
    return Chart(name, "Attention by distance", caption, (each.folder / ANALYSIS,), data, page, draw)


def anchor_share(each: AttentionAnalysis, name: str) -> Chart:
    """Attention on anchors, layer by layer."""
    runs, layers = each.analysis["runs"], each.analysis["layers"]
    tables = [pd.DataFrame(layers[run]["anchor_share"], dtype=float) for run in runs]
    data = pd.concat(tables, keys=runs, names=["run", "layer"]).reset_index()
    tokens = each.analysis["overall"][runs[0]]["anchor_tokens"]["mean"]
    page = page_figure(showlegend=len(runs) > 1, height=300)
    for run, group in data.groupby("run", sort=False):
        hover = "layer %{x}: %{y:.1%}<extra>%{fullData.name}</extra>"
        page.add_traces(_band(str(run), group.layer, group[ESTIMATE], hovertemplate=hover))
    page.add_hline(tokens, line={"dash": "dot", "width": 1, "color": "#888888"})
    page.update_xaxes(title="layer", tick0=0, dtick=_tick(data.layer))
    page.update_yaxes(title="attention on anchors", tickformat=".0%", rangemode="tozero")

    def draw(figure: PaperFigure) -> None:
        figure.set_size_inches(4.2, 2.6)
        axes = figure.subplots()
        for run, group in data.groupby("run", sort=False):
            colour = figures.COLOURS[str(run)]
            axes.plot(group.layer, group["mean"], color=colour, label=str(run))
            axes.fill_between(group.layer, group.low, group.high, color=colour, alpha=0.25, linewidth=0)
        axes.axhline(tokens, color="#888888", linestyle=":")
        axes.set(xlabel="layer", ylabel="attention on anchors", ylim=(0, None))
        axes.legend()

    caption = (
        "Share of the attention of a row's second half on anchors: special tokens, punctuation, sink and the query's "
        f"own recent window, as configured. The dotted line is their share of the tokens, {tokens:.1%}. {INTERVAL}"
    )
    return Chart(name, "Attention on anchors by layer", caption, (each.folder / ANALYSIS,), data, page, draw)


CHARTS: dict[str, Callable[[AttentionAnalysis, str], Chart]] = {
    "attention_classes": class_bars,
    "attention_class_layers": class_layers,
    "attention_anchors": anchor_share,
    "attention_distance": distance,
    "attention_concentration": concentration,
}


def _maps(
    each: AttentionAnalysis,
    data: pd.DataFrame,
    cells: Callable[[pd.DataFrame], go.Heatmap],
    x_title: str,
    y_title: str,
    colours: dict[str, Any],
) -> go.Figure:
    """A heat map for each run, with one scale of colours above them."""
    runs = each.analysis["runs"]
    page = panels(runs if len(runs) > 1 else [""], x_title, y_title, height=300)
    for number, (_, table) in enumerate(data.groupby("run", sort=False)):
        page.add_trace(cells(table).update(panel_axes(number)))
    page.update_layout(coloraxis=colours)
    page.update_xaxes(showgrid=False, tick0=0, dtick=_tick(data[x_title]))
    page.update_yaxes(showgrid=False, autorange="reversed", ticks="", tickfont={"size": 11})
    return page.update_yaxes(tick0=0, dtick=_tick(data[y_title])) if y_title else page


def _tick(numbers: pd.Series) -> int:
    """A step between whole numbers that leaves room for their labels."""
    return max(1, round(numbers.max() / 8))


def _band(run: str, x: pd.Series, estimate: pd.DataFrame, **trace: Any) -> list[go.Scatter]:
    """A line over the band of its interval."""
    colour = figures.COLOURS[run]
    around = np.concatenate([x, x[::-1]]), np.concatenate([estimate.low, estimate.high[::-1]])
    band = go.Scatter(x=around[0], y=around[1], fill="toself", fillcolor=translucent(colour), line={"width": 0})
    band.update(hoverinfo="skip", showlegend=False, legendgroup=run, mode="lines")
    line = go.Scatter(x=x, y=estimate["mean"], name=run, legendgroup=run, mode="lines+markers", line={"color": colour})
    return [band, line.update(marker={"symbol": SHAPES[run], "size": 6}, **trace)]


def _beside(
    parts: Sequence[str], draw: Callable[[FigureBase, str], None], height: float
) -> Callable[[PaperFigure], None]:
    """Draws each part on its own piece of a figure."""

    def draw_all(figure: PaperFigure) -> None:
        figure.set_size_inches(4.2 * len(parts), height)
        for piece, part in zip(figure.subfigures(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw(piece, part)

    return draw_all
