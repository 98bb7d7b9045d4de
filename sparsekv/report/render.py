"""The page: sections, charts and the token viewer in one HTML file that asks the network for nothing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from sparsekv.report.chart import Chart, Section, TextTable
from sparsekv.report.collect import Evidence
from sparsekv.report.sections import attention, cost, differences, failures, headline, retention, runs, training
from sparsekv.report.sections.headline import BigFigure
from sparsekv.report.sections.viewer import build_viewer
from sparsekv.version import VERSION, commit

FILES = Path(__file__).parent / "page"
BEFORE_VIEWER = (headline, retention, differences, training, attention)
AFTER_VIEWER = (failures, cost, runs)
MOST_ROWS = 1000  # of a chart's numbers: a long training has more points than anyone reads
AnyPart = TypeVar("AnyPart", Chart, TextTable)


@dataclass(frozen=True)
class Drawn:
    """A chart as the page's template takes it: its figure as JSON, and its numbers as text."""

    chart: Chart
    figure: Markup
    height: int
    numbers: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Page:
    """What is on a page.

    Parameters
    ----------
    title, subtitle : str
    sections : list of Section
    figures : list of BigFigure
        At the top.
    viewer : str
        JSON of the token viewer, or "".
    """

    title: str
    subtitle: str
    sections: list[Section]
    figures: list[BigFigure]
    viewer: str


def build(evidence: Evidence) -> Page:
    """All sections, in the order of the page."""
    viewer, left_out = build_viewer(evidence)
    parts = [each.build(evidence) for each in BEFORE_VIEWER]
    parts += [_viewer_section(viewer, left_out), *(each.build(evidence) for each in AFTER_VIEWER)]
    adapters = [f"{role}: {run.adapter}" for role, run in evidence.runs.items() if run.adapter]
    subtitle = "What eviction of the KV cache costs this model, and what training changed."
    return Page(
        f"SparseKV: {evidence.model}",
        " · ".join([subtitle, *adapters]),
        _named_apart(parts),
        headline.figures(evidence),
        viewer,
    )


def _named_apart(sections: Sequence[Section]) -> list[Section]:
    """Charts and tables of the same name get a number: names of benchmarks may differ in what no file's name holds."""
    seen: set[str] = set()

    def numbered(each: AnyPart) -> AnyPart:
        name = each.name
        for number in itertools.count(2):
            if name not in seen:
                break
            name = f"{each.name}-{number}"
        seen.add(name)
        return replace(each, name=name)

    return [
        replace(section, charts=list(map(numbered, section.charts)), tables=list(map(numbered, section.tables)))
        for section in sections
    ]


def _viewer_section(viewer: str, left_out: Sequence[Path]) -> Section:
    title = "What is kept"
    files = ", ".join(f"`{path}`" for path in left_out)
    lacking = f"Left out, to keep this page small: {files}." if left_out else ""
    if viewer:
        intro = "A context of the evaluation, token by token: what a press keeps of it."
        return Section("viewer", title, f"{intro} {lacking}".strip())
    missing = "No view of a context here: `sparsekv eval` keeps one of each benchmark that asks questions."
    return Section("viewer", title, missing=lacking or missing)


def render(page: Page) -> str:
    """The HTML. Its template escapes all text but its own files and JSON, in which `<` has an escape of JSON's."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["with_code"] = _with_code
    sections = [{**vars(section), "charts": [_drawn(chart) for chart in section.charts]} for section in page.sections]
    return environment.get_template("report.html.j2").render(
        vars(page),
        sections=sections,
        viewer=Markup(page.viewer),
        plotly_js=Markup(get_plotlyjs()) if any(section.charts for section in page.sections) else "",
        own=lambda name: Markup((FILES / name).read_text("utf-8")),
        version=VERSION,
        commit=commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _with_code(text: str) -> Markup:
    """Escaped text, in which what stands between backticks is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _drawn(chart: Chart) -> Drawn:
    figure = Markup(chart.page.to_json().replace("<", "\\u003c"))
    shown, total = chart.data.head(MOST_ROWS), len(chart.data)
    numbers = "The numbers" if len(shown) == total else f"The first {MOST_ROWS:,} of {total:,} rows of its numbers"
    return Drawn(chart, figure, chart.page.layout.height, numbers, list(map(str, shown.columns)), text_rows(shown))


def text_rows(data: pd.DataFrame) -> list[list[str]]:
    """A table's numbers as they are read: four digits, nothing where there is none."""
    return [[_text(value) for value in row] for row in data.itertuples(index=False)]


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.4g}"
    return "–" if value is None or value is pd.NA else str(value)
