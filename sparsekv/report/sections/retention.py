"""Retention curves: for each benchmark the score against the share of the cache that is evicted, press by press."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from sparsekv.evaluation.comparison.compare import Analysis
from sparsekv.evaluation.comparison.levels import ALL_TASKS
from sparsekv.evaluation.comparison.results import NO_PRESS
from sparsekv.evaluation.comparison.tables import benchmark_name, cell_name, figure_text, score_form
from sparsekv.report.cells import chart_name, predictions
from sparsekv.report.chart import Chart, Section
from sparsekv.report.collect import Evidence
from sparsekv.report.look import (
    PAPER_MARKERS,
    one_legend,
    panel_axes,
    panels,
    paper_legend,
    plain,
    run_looks,
    translucent,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as PaperFigure

INTRO = (
    "Each panel is a press. At compression ratio 0 stands the run's own full cache: the flatter a line, the less "
    "eviction costs. Where the bands of two runs overlap, look at the paired differences below."
)
COLUMNS = ["run", "press", "compression_ratio", "n", "score", "ci_low", "ci_high", "retention"]


def build(evidence: Evidence) -> Section:
    """A chart for each benchmark and metric."""
    title = "Retention"
    charts = [chart for analysis in evidence.analyses for chart in _charts(evidence, analysis)]
    if not charts:
        missing = "No evicted cell here: `sparsekv eval --presses … --ratios …` evaluates some."
        return Section("retention", title, missing=missing)
    return Section("retention", title, INTRO, charts)


def _charts(evidence: Evidence, analysis: Analysis) -> Iterator[Chart]:
    summary = analysis.summary
    averages = summary[(summary.task == ALL_TASKS) & (summary.reason == "")]
    for _, table in averages.groupby(["benchmark", "data_dir", "metric"], sort=False):
        if (table.press != NO_PRESS).any():
            yield chart(evidence, analysis, table)


def chart(evidence: Evidence, analysis: Analysis, table: pd.DataFrame) -> Chart:
    """A panel for each press."""
    first = table.iloc[0]
    data = curves(table)
    direction = "lower is better" if first.lower_is_better else "higher is better"

    def draw(figure: PaperFigure) -> None:
        _draw(figure, data, first.metric)

    return Chart(
        chart_name("retention", analysis, first, first.metric),
        f"{benchmark_name(first)}: {first.metric}",
        f"Mean over {first.n} rows, {direction}; every task counts the same. Bands: 95% bootstrap intervals over rows.",
        predictions(evidence, data.run.unique(), first),
        data[COLUMNS],
        _page(data, first.metric),
        draw,
    )


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run, press and ratio; every press begins with the full cache at ratio 0."""
    full, evicted = table[table.press == NO_PRESS], table[table.press != NO_PRESS]
    parts = []
    for (run, press), group in evicted.groupby(["run", "press"], sort=False):
        parts += [full[full.run == run].assign(press=press), group.sort_values("compression_ratio")]
    return pd.concat(parts, ignore_index=True)


def _hover(row: dict[str, Any]) -> str:
    score, retention = figure_text(row, "score", score_form(row), "ci"), figure_text(row, "retention", "{:.1%}")
    return f"{cell_name(row)}<br>{score}<br>retention {retention}"


def _page(data: pd.DataFrame, metric: str) -> go.Figure:
    presses, looks = list(dict.fromkeys(data.press)), run_looks(dict.fromkeys(data.run))
    figure = panels(presses, x_title="compression ratio", y_title=metric)
    for (run, press), curve in data.groupby(["run", "press"], sort=False):
        number, (colour, marker) = presses.index(press), looks[run]
        both = {"x": curve.compression_ratio, "name": plain(run), "legendgroup": run, **panel_axes(number)}
        edge = {
            "mode": "lines",
            "line": {"width": 1, "color": translucent(colour, 0.5)},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        figure.add_scatter(y=curve.ci_low.fillna(curve.score), **edge, **both)
        band = {"fill": "tonexty", "fillcolor": translucent(colour, 0.12)}
        figure.add_scatter(y=curve.ci_high.fillna(curve.score), **band, **edge, **both)
        line = {"mode": "lines+markers", "line": {"color": colour}, "marker": {"symbol": marker, "size": 8}}
        hover = {"text": [_hover(row) for row in curve.to_dict("records")], "hoverinfo": "text+name"}
        figure.add_scatter(y=curve.score, **line, **hover, **both)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(matches="y")
    return one_legend(figure)


def _draw(figure: PaperFigure, data: pd.DataFrame, metric: str) -> None:
    presses = list(dict.fromkeys(data.press))
    columns = min(len(presses), 4)
    rows = -(-len(presses) // columns)
    figure.set_size_inches(1.9 * columns + 0.4, 1.8 * rows + 0.3)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(presses) :]:
        axes.set_visible(False)
    for axes, press in zip(grid.flat, presses, strict=False):
        _draw_press(axes, data[data.press == press], run_looks(dict.fromkeys(data.run)))
        axes.set_title(press)
    figure.supxlabel("compression ratio")
    figure.supylabel(metric)
    paper_legend(figure)


def _draw_press(axes: Axes, data: pd.DataFrame, looks: dict[str, tuple[str, str]]) -> None:
    for run, curve in data.groupby("run", sort=False):
        colour, marker = looks[str(run)]
        low, high = curve.ci_low.fillna(curve.score), curve.ci_high.fillna(curve.score)
        axes.fill_between(curve.compression_ratio, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(curve.compression_ratio, curve.score, color=colour, marker=PAPER_MARKERS[marker], label=str(run))
