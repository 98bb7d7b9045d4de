"""Which needles died: answers that the full cache finds in their context and a press loses, by depth and by anchors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparsekv.evaluation.comparison.tables import benchmark_name, cell_name
from sparsekv.report.cells import file_stem, predictions
from sparsekv.report.chart import Chart, Section, TextTable
from sparsekv.report.collect import EvaluatedRun, Evidence
from sparsekv.report.look import add_colour_bar, page_figure, plain
from sparsekv.report.needles import read_needles
from sparsekv.style import SEQUENTIAL

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure as PaperFigure

INTRO = (
    "A needle is an answer that stands in its context once or twice, word for word. It is found when the prediction "
    "holds it, and it died when the full cache of the same run finds it and the press does not."
)
BINS = 10
DEPTHS = [f"{100 * bin // BINS}–{100 * (bin + 1) // BINS}%" for bin in range(BINS)]
DISTANCES = {"an anchor inside": 0, "1–2 tokens": 2, "3–8 tokens": 8, "more than 8 tokens": np.inf}  # label → at most
ALL = "any"
ROW = 30  # px
Z = 1.959964  # of a 95% interval


def build(evidence: Evidence) -> Section:
    """A heat map for each run and benchmark with needles, and for each benchmark a table by the nearest anchor."""
    title = "Failures"
    found = [(run, read_needles(run, file), file) for run in evidence.runs.values() for file in run.needles]
    found = [(run, needles, file) for run, needles, file in found if len(needles)]
    if not found:
        missing = (
            "No needles here: `sparsekv eval` with a benchmark whose answers stand in their contexts, such as "
            "ruler-local, notes where they are."
        )
        return Section("failures", title, missing=missing)
    charts = [chart(evidence, run, needles, file) for run, needles, file in found if needles.died.notna().any()]
    tables = []
    for name in dict.fromkeys(benchmark_name(needles.iloc[0]) for _, needles, _ in found):
        tables.append(table(evidence, [one for one in found if benchmark_name(one[1].iloc[0]) == name]))
    return Section("failures", title, INTRO, charts, tables)


# ---- by depth ----


def chart(evidence: Evidence, run: EvaluatedRun, needles: pd.DataFrame, file: Path) -> Chart:
    """Press and ratio × depth in the context."""
    data = by_depth(needles)
    count = len(needles[needles.died.notna()][["row", "answer"]].drop_duplicates())
    caption = (
        f"Share of needles that died, by where in the context they stand: n = {count} needles that the full cache of "
        f"{run.role} finds. Empty: no such needle at this depth."
    )

    def draw(figure: PaperFigure) -> None:
        _draw(figure, data)

    first = needles.iloc[0]
    return Chart(
        file_stem("failures", run.role, first.benchmark, first.data_dir),
        f"{benchmark_name(first)}: needles that died, {run.role}",
        caption,
        (file, *predictions(evidence, [run.role], first)),
        data,
        _page(data),
        draw,
    )


def by_depth(needles: pd.DataFrame) -> pd.DataFrame:
    """One row a cell and a tenth of the context: n needles found by the full cache, how many died, and their share."""
    table = needles[needles.died.notna()]
    tenth = (table.depth * BINS).astype(int).clip(upper=BINS - 1)
    groups = table.assign(depth=tenth).groupby(["press", "compression_ratio", "depth"])
    data = groups.died.agg(n="size", died="sum").reset_index()
    data["share"] = data.died / data.n
    data["cell"] = [cell_name(row) for row in data.to_dict("records")]
    data["depth"] = [DEPTHS[bin] for bin in data.depth]
    return data


def _grid(data: pd.DataFrame, name: str) -> pd.DataFrame:
    return data.pivot(index="cell", columns="depth", values=name).reindex(index=_cells(data), columns=DEPTHS)


def _cells(data: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(data.cell))


def _page(data: pd.DataFrame) -> go.Figure:
    hover = data.assign(
        hover=[f"{plain(row.cell)}<br>depth {row.depth}: {row.died:.0f} of {row.n} died" for row in data.itertuples()]
    )
    figure = page_figure(height=ROW * len(_cells(data)) + 150)
    figure.add_heatmap(
        z=100 * _grid(data, "share"),
        x=DEPTHS,
        y=[plain(cell) for cell in _cells(data)],
        customdata=_grid(hover, "hover"),
        texttemplate="%{z:.0f}",
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=SEQUENTIAL,
        zmin=0,
        zmax=100,
        xgap=2,
        ygap=2,
    )
    add_colour_bar(figure, "died, %")
    figure.update_xaxes(type="category", showgrid=False, title={"text": "depth in the context"})
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure


def _draw(figure: PaperFigure, data: pd.DataFrame) -> None:
    cells, grid = _cells(data), 100 * _grid(data, "share")
    figure.set_size_inches(0.42 * BINS + 2.4, 0.22 * len(cells) + 1.2)
    axes = figure.subplots()
    image = axes.imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(grid.to_numpy()):
        if not np.isnan(share):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="black" if share > 50 else "white")
    axes.set_xticks(range(BINS), DEPTHS, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(cells)), cells)
    axes.set_xlabel("depth in the context")
    axes.grid(False)
    figure.colorbar(image, label="died, %")


# ---- by the nearest anchor ----


def table(evidence: Evidence, found: list[tuple[EvaluatedRun, pd.DataFrame, Path]]) -> TextTable:
    """A row for each run and distance to the nearest anchor, of one benchmark."""
    first = found[0][1].iloc[0]
    caption = (
        "Nearest anchor: tokens from the needle to the nearest special token or punctuation. Died: share over all "
        "presses and ratios, with Wilson's 95% interval for as many trials as there are needles that the full cache "
        "finds: what several presses make of one needle is not independent."
    )
    files = [file for run, _, file in found for file in (file, *predictions(evidence, [run.role], first))]
    return TextTable(
        file_stem("failures_anchors", first.benchmark, first.data_dir),
        f"{benchmark_name(first)}: did an anchor stand near?",
        caption,
        tuple(files),
        ["run", "nearest anchor", "needles", "found by the full cache", "died"],
        [line for run, needles, _ in found for line in _lines(run.role, needles)],
    )


def _lines(role: str, needles: pd.DataFrame) -> Iterator[list[str]]:
    labels = np.array(list(DISTANCES))
    nearest = labels[np.searchsorted(list(DISTANCES.values()), needles.anchor_distance.fillna(np.inf))]
    for label in (ALL, *DISTANCES):
        group = needles if label == ALL else needles[nearest == label]
        lost = group[group.died.notna()]
        count, known = (len(part[["row", "answer"]].drop_duplicates()) for part in (group, lost))
        if count:
            yield [role, label, str(count), str(known), _share(lost.died.mean(), known) if known else "–"]


def _share(share: float, n: int) -> str:
    low, high = wilson(share, n)
    return f"{share:.0%} [{low:.0%}, {high:.0%}]"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share of n trials (E. B. Wilson 1927, "Probable Inference")."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return middle - half, middle + half
