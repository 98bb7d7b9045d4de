"""What a page is made of: sections with charts and tables, each of which says which files it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure as PaperFigure
    from plotly.graph_objects import Figure as PageFigure


@dataclass(frozen=True)
class Chart:
    """One figure, drawn twice from the same data: by plotly for the page and by matplotlib for a paper.

    Parameters
    ----------
    name : str
        Stem of its exported files, of letters, digits, `_`, `-` and `.`; no other chart has it.
    title, caption : str
        The caption says in plain sentences what is drawn, n, and what an interval is.
    sources : tuple of Path
        The files that its numbers come from.
    data : DataFrame
        The numbers, one row a mark.
    page : plotly Figure
        Without colours for background and text: the page has a light and a dark look.
    draw : callable
        Draws on an empty matplotlib Figure, inside `sparsekv.style.paper_style`.
    """

    name: str
    title: str
    caption: str
    sources: tuple[Path, ...]
    data: pd.DataFrame
    page: PageFigure
    draw: Callable[[PaperFigure], None]


@dataclass(frozen=True)
class TextTable:
    """Cells of text under a header; `name` as a chart's."""

    name: str
    title: str
    caption: str
    sources: tuple[Path, ...]
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Parameters
    ----------
    key : str
        Its anchor in the page.
    title, intro : str
        The intro says what to look for, in a sentence or two.
    charts : list of Chart
    tables : list of TextTable
    missing : str
        Where there is nothing to show: a sentence that says what would fill the section, with the command.
    """

    key: str
    title: str
    intro: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)
    missing: str = ""
