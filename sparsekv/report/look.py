"""The common look of the page's charts: made for a light and a dark page, and for any width."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from sparsekv.style import MARKERS, PALETTE, RUNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as PaperFigure

FAINT = "rgba(127, 127, 127, 0.25)"  # of lines, on a light page and on a dark one
PAPER_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "cross": "P", "x": "X", "star": "*"}  # matplotlib's
PANEL_HEIGHT = 240  # px
BAR_ROOM = 66  # px, of `add_colour_bar`


def page_figure(**layout: Any) -> go.Figure:
    """An empty plotly figure, transparent, in the page's font; `layout` adds to the common look and wins over it.

    The page gives it its colour of text and its width. Text that comes from data goes through `plain`.
    """
    axis: dict[str, Any] = {"gridcolor": FAINT, "zerolinecolor": FAINT, "linecolor": FAINT, "automargin": True}
    axis["title"] = {"font": {"size": 13}}
    common: dict[str, Any] = {
        "template": {"layout": {"xaxis": axis, "yaxis": axis, "colorway": list(PALETTE)}},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"family": "inherit", "size": 13},
        "margin": {"l": 8, "r": 8, "t": 40, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
        "hovermode": "closest",
        "height": 380,
    }
    return go.Figure(layout=go.Layout(common).update(layout))


def panels(titles: Sequence[str], x_title: str = "", y_title: str = "", height: int = PANEL_HEIGHT) -> go.Figure:
    """A figure of several panels; the page's script places as many beside each other as its width has room for.

    Parameters
    ----------
    titles : sequence of str
        One for each panel, over it.
    x_title, y_title : str
        Of every panel's axes.
    height : int
        Of a panel, in px.

    Returns
    -------
    Figure
        Add traces of panel number n = 0, 1, … with `figure.add_trace(trace.update(panel_axes(n)))`.
    """
    figure = page_figure(meta={"panels": len(titles), "panel_height": height})
    for number, title in enumerate(titles):
        axes = panel_axes(number)
        x_axis = {"anchor": axes["yaxis"], "title": {"text": x_title, "standoff": 4}}
        y_axis = {"anchor": axes["xaxis"], "title": {"text": y_title, "standoff": 4}}
        figure.update_layout({f"xaxis{number + 1}": x_axis, f"yaxis{number + 1}": y_axis})
        corner = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(text=f"<b>{plain(title)}</b>", showarrow=False, **corner)
    return figure


def panel_axes(number: int) -> dict[str, str]:
    """The axes of a panel, as a trace takes them: number 0 has x and y, number 1 x2 and y2."""
    suffix = str(number + 1) if number else ""
    return {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def plain(text: object) -> str:
    """Text as plotly shall show it: by itself it takes some HTML tags for formatting."""
    return html.escape(str(text), quote=False)


def add_colour_bar(figure: go.Figure, title: str, **options: Any) -> None:
    """A scale of colours above a heat map, where it takes no width from it on a phone, under a line of text.

    The text is the figure's own title: plotly writes that of a thin bar over the bar.
    """
    place = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
    size = {"orientation": "h", "thickness": 10, "lenmode": "pixels", "len": 250, "outlinewidth": 0, "ypad": 22}
    bar = {**place, **size, "tickfont": {"size": 11}, **options}
    shared = figure.layout.coloraxis.colorscale is not None
    (figure.update_coloraxes if shared else figure.update_traces)(colorbar=bar)
    text = {"text": title, "font": {"size": 12}, "pad": {"t": 4, "l": 10}}
    figure.update_layout(title={**text, **place}, margin={"t": BAR_ROOM})


def translucent(colour: str, opacity: float = 0.18) -> str:
    """A colour `#rrggbb` that lets the page shine through, as an interval's band has it."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def one_legend(figure: go.Figure) -> go.Figure:
    """Names each run once, wherever it comes first: not every panel has every run."""
    named: set[str] = set()
    for trace in figure.data:
        if trace.showlegend is None:
            trace.showlegend = trace.legendgroup not in named
            named.add(trace.legendgroup)
    return figure


def paper_legend(figure: PaperFigure) -> None:
    """The same for a figure of several axes on paper, in the first of them."""
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.axes[0].legend(handles=list(lines.values()))


def run_looks(runs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Run → its colour and its plotly marker, everywhere the same; runs with names of their own take what is left."""
    spare = [(colour, marker) for colour, marker in zip(PALETTE[::-1], ("cross", "x", "star"), strict=False)]
    looks: dict[str, tuple[str, str]] = {}
    for name in runs:
        unknown = spare[(len(looks.keys() - RUNS)) % len(spare)]
        looks[name] = (RUNS[name], MARKERS[name]) if name in RUNS else unknown
    return looks
