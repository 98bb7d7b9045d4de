"""Charts and tables as files."""

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from cells import write_cell
from PIL import Image

from sparsekv.report import render
from sparsekv.report.chart import Section, TextTable
from sparsekv.report.collect import collect
from sparsekv.report.export import latex, markdown, write_figures, write_tables

TABLE = TextTable(
    "name",
    "50% of $x_1$",
    "▲ better & so on.",
    (Path("out/a_b"),),
    ["", "run"],
    [["a|b", "x_1 → 5% − #2"], [r"\{~^<", ""]],
)


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> list[Section]:
    """Of a base and a trained run whose tasks have names that matplotlib might read as formulas."""
    folder = tmp_path_factory.mktemp("results")
    for adapter in (None, "final"):
        for press, ratio in (("no_press", 0.0), ("knorm", 0.5)):
            scores = {"cost in $": [100, 50, 0], "$x^{": [100, 0, 50]}
            write_cell(folder / str(adapter), press, ratio, scores, adapter=adapter)
    return render.build(collect([folder])).sections


def test_every_chart_as_two_pictures_and_its_numbers(tmp_path, sections):
    write_figures(sections, tmp_path)
    charts = [chart for section in sections for chart in section.charts]
    assert {chart.name.split("_")[0] for chart in charts} == {"retention", "differences"}
    names = {f"{chart.name}.{kind}" for chart in charts for kind in ("png", "svg", "csv")}
    assert {path.name for path in tmp_path.iterdir()} == names
    for chart in charts:
        table = pd.read_csv(tmp_path / f"{chart.name}.csv", keep_default_na=True)
        pd.testing.assert_frame_equal(table, chart.data, check_dtype=False, rtol=1e-5)
        colours = Image.open(tmp_path / f"{chart.name}.png").convert("RGB").getcolors(1 << 24)
        assert len(colours) > 20, "something is drawn"


@pytest.mark.parametrize(
    ("chart", "text"), [("differences", "$x^{"), ("differences", "cost in $"), ("retention", "knorm")]
)
def test_text_in_a_picture_is_text(tmp_path, sections, chart, text):
    write_figures(sections, tmp_path)
    (path,) = tmp_path.glob(f"{chart}*.svg")
    assert text in ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter()]


def test_the_same_numbers_give_the_same_files(tmp_path, sections):
    for name in ("one", "two"):
        write_figures(sections, tmp_path / name)
        write_tables(sections, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_every_table_in_two_languages(tmp_path, sections):
    write_tables(sections, tmp_path)
    tables = [table for section in sections for table in section.tables]
    assert {table.name.split("_")[0] for table in tables} == {"headline", "cost", "runs"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{table.name}.{kind}" for table in tables for kind in ("tex", "md")
    }


def test_latex_reads_text_as_text():
    lines = latex(TABLE).splitlines()
    assert r"\caption{50\% of \$x\_1\$. $\blacktriangle$ better \& so on.}" in lines
    assert r" & run \\" in lines
    assert r"a|b & x\_1 $\to$ 5\% $-$ \#2 \\" in lines
    assert r"\textbackslash{}\{\textasciitilde{}\textasciicircum{}$<$ &  \\" in lines
    assert lines[0] == "% out/a_b"
    assert lines.count(r"\begin{tabular}{ll}") == lines.count(r"\end{tabular}") == 1


def test_a_line_break_or_a_bracket_breaks_no_table():
    table = dataclasses.replace(TABLE, sources=(Path("a\nb"),), rows=[["[1]\n\nx", "a\u2028b"]])
    assert "% a b" in latex(table).splitlines()
    assert r"{[}1] x & a b \\" in latex(table).splitlines()
    assert "| [1] x | a b |" in markdown(table).splitlines()


def test_markdown_keeps_its_columns():
    assert markdown(TABLE).splitlines() == [
        "## 50% of $x_1$",
        "",
        "|  | run |",
        "| --- | --- |",
        r"| a\|b | x_1 → 5% − #2 |",
        r"| \{~^< |  |",
        "",
        "▲ better & so on.",
        "",
        "From: `out/a_b`",
    ]
