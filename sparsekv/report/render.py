"""The page: sections, charts and the token viewer in one HTML file that asks the network for nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from sparsekv.report.chart import Chart, Section
from sparsekv.report.collect import Evidence
from sparsekv.report.sections import attention, cost, differences, failures, headline, retention, runs, training
from sparsekv.report.sections.headline import BigFigure
from sparsekv.report.sections.viewer import build_viewer
from sparsekv.version import VERSION, commit

FILES = Path(__file__).parent / "page"
BEFORE_VIEWER = (headline, retention, differences, training, attention)
AFTER_VIEWER = (failures, cost, runs)


@dataclass(frozen=True)
class Drawn:
    """A chart as the page's template takes it: its figure as JSON, and its numbers as text."""

    chart: Chart
    figure: Markup
    height: int
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
    viewer = build_viewer(evidence)
    parts = [each.build(evidence) for each in BEFORE_VIEWER]
    parts += [_viewer_section(viewer), *(each.build(evidence) for each in AFTER_VIEWER)]
    adapters = [f"{role}: {run.adapter}" for role, run in evidence.runs.items() if run.adapter]
    subtitle = "What eviction of the KV cache costs this model, and what training changed."
    return Page(
        f"SparseKV: {evidence.model}", " · ".join([subtitle, *adapters]), parts, headline.figures(evidence), viewer
    )


def _viewer_section(viewer: str) -> Section:
    title = "What is kept"
    if not viewer:
        missing = "No view of a context here: `sparsekv eval` keeps one of each benchmark that asks questions."
        return Section("viewer", title, missing=missing)
    return Section("viewer", title, "A context of the evaluation, token by token: what a press keeps of it.")


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
    return Drawn(chart, figure, chart.page.layout.height, list(map(str, chart.data.columns)), text_rows(chart.data))


def text_rows(data: pd.DataFrame) -> list[list[str]]:
    """A table's numbers as they are read: four digits, nothing where there is none."""
    return [[_text(value) for value in row] for row in data.itertuples(index=False)]


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.4g}"
    return "–" if value is None or value is pd.NA else str(value)
