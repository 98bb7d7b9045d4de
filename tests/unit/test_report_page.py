"""The page: one file that asks the network for nothing, and in which text from data stays text."""

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from cells import write_cell
from evidence import ATTACK, make_evidence, write_training

from sparsekv.errors import UserError
from sparsekv.report import render
from sparsekv.report.collect import collect
from sparsekv.report.config import ReportConfig
from sparsekv.report.look import page_figure, panel_axes, panels, plain, run_looks
from sparsekv.report.run import report

PLOTLY = "/* plotly */"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(HTMLParser):
    """The elements of a page: (tag, attributes, text directly in it)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(html)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict, str]]:
        """(attributes, text) of the elements with this tag and these attributes."""
        wanted = attributes.items()
        return [
            (found, "".join(text)) for name, found, text in self.elements if name == tag and wanted <= found.items()
        ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return render.build(collect([make_evidence(tmp_path_factory.mktemp("evidence"))]))


@pytest.fixture(scope="module")
def whole(page):
    return render.render(page)


@pytest.fixture(scope="module")
def html(page):
    """Without plotly's own code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "get_plotlyjs", lambda: PLOTLY)
        return render.render(page)


@pytest.fixture(scope="module")
def parsed(html):
    return Parsed(html)


def test_sections_come_in_order_each_with_a_link(parsed):
    keys = ["headline", "retention", "differences", "training", "attention", "viewer", "failures", "cost", "runs"]
    assert [attributes["id"] for attributes, _ in parsed.all("section")] == keys
    links = [attributes["href"] for attributes, _ in parsed.all("a")]
    assert links == ["#main", *(f"#{key}" for key in keys)]


def test_text_from_data_stays_text(html, parsed):
    assert ATTACK not in html
    assert "<script>document" not in html
    assert not parsed.all("img")
    assert sum(ATTACK in "".join(text) for _, _, text in parsed.elements) > 5, "it is shown"
    known = {None, "application/json"}
    assert {attributes.get("type") for attributes, _ in parsed.all("script")} == known
    assert not [name for _, found, _ in parsed.elements for name in found if name.startswith("on")]


def test_nothing_is_asked_of_the_network(html, parsed):
    assert not [found for _, found, _ in parsed.elements if "src" in found]
    assert all(found["href"].startswith("#") for _, found, _ in parsed.elements if "href" in found)
    assert not parsed.all("link")
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|@import|url\(", html)
    policy = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_one_file_of_bearable_size(whole, html):
    assert whole.count("<script") == html.count("<script")
    assert "plotly.js v" in whole
    assert len(whole.encode()) < 15e6


def test_every_chart_has_its_figure_its_numbers_and_its_files(page, parsed):
    charts = [chart for section in page.sections for chart in section.charts]
    assert len({chart.name for chart in charts}) == len(charts) > 5
    shown = {found["id"] for found, _ in parsed.all("figure") if "id" in found}
    assert shown == {f"chart-{chart.name}" for chart in charts}
    codes = {text for _, text in parsed.all("code")}
    rows = len(parsed.all("tr"))
    for chart in charts:
        (_, figure), *others = parsed.all("script", id=f"figure-{chart.name}")
        assert not others
        assert json.loads(figure) == json.loads(chart.page.to_json())
        assert chart.sources
        assert {str(file) for file in chart.sources} <= codes
    tables = [table for section in page.sections for table in section.tables]
    assert rows == sum(len(each.data) for each in charts) + sum(len(each.rows) for each in tables) + len(
        charts + tables
    )


def test_ids_are_there_once_and_labels_lead_to_them(parsed):
    ids = [found["id"] for _, found, _ in parsed.elements if "id" in found]
    assert len(ids) == len(set(ids))
    referred = {name for _, found, _ in parsed.elements for name in found.get("aria-labelledby", "").split()}
    assert referred <= set(ids)
    assert {found["data-figure"] for _, found, _ in parsed.elements if "data-figure" in found} <= set(ids)


def test_what_is_missing_is_a_sentence(tmp_path):
    write_training(tmp_path / "run", control=False)
    page = render.build(collect([tmp_path]))
    parsed = Parsed(render.render(page))
    there = {section.key for section in page.sections if not section.missing}
    assert there == {"training", "runs"}
    assert "sparsekv analyze --output_dir DIR" in {text for _, text in parsed.all("code")}
    missing = [text for _, text in parsed.all("p", **{"class": "missing"})]
    assert len(missing) == 7
    assert all(text.endswith(".") for text in missing)
    assert not parsed.all("div", id="token-viewer")


def test_without_charts_no_plotly(tmp_path):
    write_cell(tmp_path, "no_press", 0.0, {"vt": [100, 50]})
    page = render.build(collect([tmp_path]))
    assert not any(section.charts for section in page.sections)
    assert len(render.render(page)) < 100_000


def test_benchmarks_whose_names_no_file_can_hold_have_charts_of_their_own(tmp_path):
    for name in ("тест", "другой", "my set", "my-set"):
        for press, ratio in (("no_press", 0.0), ("knorm", 0.5)):
            write_cell(tmp_path / "base", press, ratio, {"vt": [100, 50]}, data=(name, None))
    page = render.build(collect([tmp_path]))
    parts = [part for section in page.sections for part in (*section.charts, *section.tables)]
    assert len(parts) == 4 * 3 + 1  # a retention chart, a headline and a cost table each
    assert len({part.name for part in parts}) == len(parts)


def test_a_long_table_of_numbers_breaks_off_and_says_so(page, monkeypatch):
    monkeypatch.setattr(render, "MOST_ROWS", 3)
    html = render.render(page)
    long = [chart for section in page.sections for chart in section.charts if len(chart.data) > 3]
    assert html.count("<summary>The first 3 of ") == len(long) > 3
    assert html.count("<summary>The numbers<") == sum(len(s.charts) for s in page.sections) - len(long)


def test_numbers_are_short():
    table = pd.DataFrame({"run": ["base", None], "score": [1 / 3, float("nan")], "n": [5, 6]})
    assert render.text_rows(table) == [["base", "0.3333", "5"], ["–", "–", "6"]]


# ---- the common look ----


def test_a_layout_wins_over_the_common_look():
    assert page_figure().layout.height == 380
    assert page_figure(height=99).layout.height == 99
    assert page_figure(margin={"t": 1}).layout.margin.t == 1
    assert page_figure(margin={"t": 1}).layout.margin.l == page_figure().layout.margin.l


def test_every_panel_has_axes_of_its_own():
    figure = panels(["a", "<b>"], "x", "y", height=100)
    for number in range(2):
        figure.add_scatter(y=[1], **panel_axes(number))
    assert [trace.xaxis for trace in figure.data] == ["x", "x2"]
    assert (figure.layout.xaxis2.anchor, figure.layout.yaxis2.anchor) == ("y2", "x2")
    assert figure.layout.meta == {"panels": 2, "panel_height": 100}
    assert [note.text for note in figure.layout.annotations] == ["<b>a</b>", "<b>&lt;b&gt;</b>"]


def test_plotly_formats_no_text_from_data():
    assert plain('<a href="x">&') == '&lt;a href="x"&gt;&amp;'


def test_runs_look_different_from_each_other():
    looks = run_looks(["base", "control", "trained", "one", "two"])
    assert len({colour for colour, _ in looks.values()}) == len({marker for _, marker in looks.values()}) == 5
    assert run_looks(["trained"])["trained"] == looks["trained"]


# ---- the command ----


def test_nothing_is_written_when_something_is_wrong(tmp_path):
    with pytest.raises(UserError):
        report(ReportConfig([str(tmp_path)], str(tmp_path / "report.html"), figures=True, latex=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["report", "folder.html", "file/report.html"])
def test_a_place_that_cannot_be_written_to(tmp_path, out):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        ReportConfig([str(tmp_path)], str(tmp_path / out))


def test_a_file_in_the_way_of_the_exports(tmp_path):
    (tmp_path / "report_figures").touch()
    with pytest.raises(UserError, match=r"--out .*report_figures"):
        ReportConfig([str(tmp_path)], str(tmp_path / "report.html"))


def test_what_is_written_is_what_is_named(tmp_path):
    write_training(tmp_path / "run", control=False)
    out = tmp_path / "new" / "page.html"
    assert report(ReportConfig([str(tmp_path)], str(out))) == [out]
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    written = report(ReportConfig([str(tmp_path)], str(out), figures=True, latex=True))
    assert written == [out, out.parent / "page_figures", out.parent / "page_tables"]
    assert sorted(out.parent.iterdir()) == sorted(written)
