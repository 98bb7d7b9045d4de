"""What training changed, cell by cell and task by task: paired differences to base and to control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparsekv.evaluation.comparison.compare import SIGNIFICANT, Analysis
from sparsekv.evaluation.comparison.levels import ALL_TASKS
from sparsekv.evaluation.comparison.results import NO_PRESS
from sparsekv.evaluation.comparison.tables import (
    SYMBOLS,
    benchmark_name,
    cell_name,
    difference_text,
    p_text,
    score_form,
    task_names,
)
from sparsekv.report.cells import chart_name, predictions
from sparsekv.report.chart import Chart, Section
from sparsekv.report.collect import Evidence
from sparsekv.report.look import add_colour_bar, page_figure, plain
from sparsekv.style import DIVERGING

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure as PaperFigure

INTRO = (
    f"Purple: the trained model is better, orange: worse. ▲ and ▼ mark differences with p below {SIGNIFICANT}; "
    "without a mark, chance may explain the colour. Only what stays against the control was learned from eviction."
)
ROW = 30  # px
ROOM_FOR_VALUES = 6  # tasks; with more of them, cells hold only marks
LONGEST = 24  # characters of a task's name on an axis; all of it is in the hover and in the table


def build(evidence: Evidence) -> Section:
    """A heat map for each benchmark and each run that the trained one is compared with."""
    title = "Differences"
    charts = [chart for analysis in evidence.analyses for chart in _charts(evidence, analysis)]
    if not charts:
        missing = "Nothing to compare with: evaluate base, control and trained with the same options."
        return Section("differences", title, missing=missing)
    return Section("differences", title, INTRO, charts)


def _charts(evidence: Evidence, analysis: Analysis) -> Iterator[Chart]:
    summary = analysis.summary
    rows = summary[(summary.run == analysis.role) & summary.headline.astype(bool) & (summary.reason == "")]
    averaged = rows[rows.task == ALL_TASKS].data_dir
    within = rows.data_dir.where(rows.data_dir.isin(averaged), "")  # see `levels`
    for other in ("base", "control"):
        if f"diff_{other}" in rows:
            compared = rows[rows[f"diff_{other}"].notna()]
            for (_, suite), table in compared.groupby(["benchmark", within]):
                yield chart(evidence, analysis, table.assign(suite=suite), other)


def chart(evidence: Evidence, analysis: Analysis, table: pd.DataFrame, other: str) -> Chart:
    """Press and ratio × task."""
    first = {**table.iloc[0], "data_dir": table.suite.iloc[0]}
    data = differences(table, other)
    caption = (
        f"Score of {analysis.role} less {other}'s on the same rows; where lower is better, purple is below 0. "
        "p: two-sided paired sign-flip test, Holm-adjusted over the cells of the run."
    )

    def draw(figure: PaperFigure) -> None:
        _draw(figure, data)

    return Chart(
        chart_name("differences", analysis, first, other),
        f"{benchmark_name(first)}: {analysis.role} − {other}",
        caption,
        predictions(evidence, (other, analysis.role), first),
        data.drop(columns=["hover", "mark", "value"]),
        _page(data),
        draw,
    )


def differences(table: pd.DataFrame, other: str) -> pd.DataFrame:
    """One row a cell and task; gain is the difference, positive where the run is better."""
    single = table[table.task != ALL_TASKS]
    table = table if single.task.nunique() > 1 else single  # the average of one task is that task
    gain = table[f"diff_{other}"].where(~table.lower_is_better.astype(bool), -table[f"diff_{other}"])
    records = table.to_dict("records")
    named = table.assign(task=np.where(table.task == ALL_TASKS, ALL_TASKS, task_names(table)))
    data = named[["press", "compression_ratio", "task", "metric", "n"]].assign(
        cell=[cell_name(row) for row in records],
        gain=gain,
        difference=table[f"diff_{other}"],
        low=table[f"diff_{other}_low"],
        high=table[f"diff_{other}_high"],
        p=table[f"p_{other}"],
        verdict=table[f"verdict_{other}"],
        mark=table[f"verdict_{other}"].map(SYMBOLS).replace("=", ""),
        value=[score_form(row, "+").format(row[f"diff_{other}"] + 0.0) for row in records],
        hover=[_hover(row, other) for row in records],
    )
    order = [data.press != NO_PRESS, data.press, data.compression_ratio]
    return data.iloc[np.lexsort([np.asarray(key) for key in reversed(order)])].reset_index(drop=True)


def _hover(row: dict[str, Any], other: str) -> str:
    parts = (row["task"], cell_name(row), difference_text(row, other), f"p {p_text(row, other)}, n = {row['n']}")
    return "<br>".join(plain(part) for part in parts)


def shortened(name: str) -> str:
    """A name that leaves room for the rest."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _limit(data: pd.DataFrame) -> float:
    """Of the colours, the same on both sides of 0."""
    return float(data.gain.abs().max()) or 1.0


def _axes(data: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Cells from top to bottom, and tasks from left to right: the average comes last."""
    return list(dict.fromkeys(data.cell)), sorted(set(data.task), key=lambda task: (task == ALL_TASKS, task))


def _page(data: pd.DataFrame) -> go.Figure:
    cells, tasks = _axes(data)
    figure = page_figure(height=ROW * len(cells) + 150)
    grids = {
        name: data.pivot(index="cell", columns="task", values=name).reindex(index=cells, columns=tasks)
        for name in ("gain", "mark", "value", "hover")
    }
    figure.add_heatmap(
        z=grids["gain"],
        x=[plain(task) for task in tasks],
        y=[plain(cell) for cell in cells],
        text=grids["mark"].fillna("") if len(tasks) > ROOM_FOR_VALUES else grids["mark"] + " " + grids["value"],
        customdata=grids["hover"],
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=DIVERGING,
        zmid=0,
        zmin=-_limit(data),
        zmax=_limit(data),
        xgap=2,
        ygap=2,
    )
    add_colour_bar(figure, "better →")
    short = [plain(shortened(task)) for task in tasks]
    figure.update_xaxes(type="category", showgrid=False, tickvals=figure.data[0].x, ticktext=short)
    figure.update_yaxes(type="category", showgrid=False, dtick=1, autorange="reversed")
    return figure


def _draw(figure: PaperFigure, data: pd.DataFrame) -> None:
    cells, tasks = _axes(data)
    figure.set_size_inches(0.45 * len(tasks) + 2.4, 0.22 * len(cells) + 1.2)
    axes = figure.subplots()
    grid = data.pivot(index="cell", columns="task", values="gain").reindex(index=cells, columns=tasks)
    limit = _limit(data)
    image = axes.imshow(grid, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    for row in data[data.mark != ""].itertuples():
        colour = "white" if abs(row.gain) > limit / 2 else "black"
        axes.text(tasks.index(row.task), cells.index(row.cell), row.mark, color=colour, ha="center", va="center")
    axes.set_xticks(
        range(len(tasks)), [shortened(task) for task in tasks], rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(cells)), cells)
    axes.grid(False)
    figure.colorbar(image, label="better →")
