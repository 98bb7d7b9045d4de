"""The failure map: needles that the full cache finds and a press loses, counted from the files."""

import csv

import pandas as pd
import pytest
from cells import write_cell
from matplotlib.figure import Figure
from scipy.stats import binomtest

from sparsekv.errors import UserError
from sparsekv.report.chart import Section
from sparsekv.report.collect import Evidence, collect
from sparsekv.report.sections import failures
from sparsekv.style import paper_style

COLUMNS = "benchmark,data_dir,model,benchmark_fingerprint,row,task,answer,position,context_tokens,depth,anchor_distance"
NEEDLES = [  # row, answer, depth, distance
    (0, "0042", 0.05, 0),
    (1, "B<b>1", 0.31, 1),
    (1, "NaN", 0.39, 2),
    (2, "c2", 0.999, 9),
    (3, "d3", 0.5, ""),
]
SAID = {  # cell → what was predicted for rows 0 … 3
    ("no_press", 0.0): ["It is 0042", "b<b>1 and nan", "c\n2", "nothing"],
    ("knorm", 0.5): ["It is 0042", "B<b>1", "2", "d3"],
    ("knorm", 0.75): ["42", "", "", ""],
}


def write_run(folder, said=SAID, adapter=None):
    for (press, ratio), texts in said.items():
        cell = write_cell(folder, press, ratio, {"niah": [1.0] * 4}, adapter=adapter, data=("ruler-local", 64))
        table = pd.read_csv(cell / "predictions.csv")
        table.assign(predicted_answer=texts).to_csv(cell / "predictions.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    (folder / "needles").mkdir()
    with (folder / "needles" / "ruler-local__64__tiny.csv").open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(COLUMNS.split(","))
        for row, answer, depth, distance in NEEDLES:
            place = ("niah", answer, int(100 * depth), 100, depth, distance)
            writer.writerow(["ruler-local", "64", "tiny", "f", row, *place])
    return folder


def build(*folders) -> Section:
    return failures.build(collect(list(folders)))


def test_a_needle_dies_where_the_full_cache_finds_it_and_the_press_does_not(tmp_path):
    (chart,) = build(write_run(tmp_path / "base")).charts
    assert chart.name == "failures_base_ruler-local_64"
    assert "n = 4 needles" in chart.caption  # d3 is found by no full cache
    found = chart.data.set_index(["compression_ratio", "depth"])[["n", "died"]].T.to_dict("list")
    assert found == {
        (0.5, "0–10%"): [1, 0],
        (0.5, "30–40%"): [2, 1],
        (0.5, "90–100%"): [1, 1],
        (0.75, "0–10%"): [1, 1],
        (0.75, "30–40%"): [2, 2],
        (0.75, "90–100%"): [1, 1],
    }
    (grid,) = chart.page.data
    assert list(grid.y) == ["knorm, 50%", "knorm, 75%"]
    assert [float(value) for value in grid.z[0] if value == value] == [0, 50, 100]
    assert "1 of 2 died" in grid.customdata[0][3]
    assert {path.name for path in chart.sources} == {"ruler-local__64__tiny.csv", "predictions.csv"}
    assert all(path.is_file() for path in chart.sources)
    figure = Figure()
    with paper_style():
        chart.draw(figure)
    assert len(figure.axes) == 2


def test_table_counts_needles_by_the_nearest_anchor(tmp_path):
    base, trained = write_run(tmp_path / "base"), write_run(tmp_path / "trained", adapter="out/final")
    section = build(base, trained)
    assert [chart.name for chart in section.charts] == [
        "failures_base_ruler-local_64",
        "failures_trained_ruler-local_64",
    ]
    (table,) = section.tables
    rows = [row for row in table.rows if row[0] == "base"]
    assert [row[1:4] for row in rows] == [
        ["any", "5", "4"],
        ["an anchor inside", "1", "1"],
        ["1–2 tokens", "2", "2"],
        ["more than 8 tokens", "2", "1"],
    ]
    assert rows[0][4].startswith("75% [")  # 6 of 8
    assert rows[2][4].startswith("75% [")
    assert [row[1:] for row in table.rows if row[0] == "trained"] == [row[1:] for row in rows]


def test_nothing_found_by_the_full_cache_is_a_table_and_no_chart(tmp_path):
    section = build(write_run(tmp_path / "base", dict.fromkeys(SAID, ["nothing"] * 4)))
    assert not section.charts
    assert section.tables[0].rows[0] == ["base", "any", "5", "0", "–"]


def test_without_needles_there_is_a_sentence():
    section = failures.build(Evidence({}, [], [], []))
    assert "sparsekv eval" in section.missing
    assert not section.tables


def test_text_of_cells_is_escaped(tmp_path):
    said = {("no_press", 0.0): SAID["no_press", 0.0], ("knorm:x=<b>", 0.5): [""] * 4}
    (chart,) = build(write_run(tmp_path / "base", said)).charts
    (grid,) = chart.page.data
    assert "<b>" not in str(grid.y)
    assert "knorm:x=&lt;b&gt;" in str(grid.customdata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("depth", "deep"), r"corrupt \(no column depth\)"),
        (lambda text: text.splitlines()[0], "corrupt"),
        (lambda text: "", "corrupt"),
        (lambda text: text.replace("0.05", '"much"'), "corrupt"),
        (lambda text: text.replace('"f"', '"g"'), "of other rows than"),
    ],
)
def test_bad_needles_are_one_line(tmp_path, change, message):
    folder = write_run(tmp_path / "base")
    file = folder / "needles" / "ruler-local__64__tiny.csv"
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match=f"^{file}: {message}[^\n]+delete"):
        build(folder)


def test_a_fingerprint_that_looks_like_a_number_is_text(tmp_path):
    folder = write_run(tmp_path / "base")
    for file in (*folder.glob("*/config.yaml"), *folder.glob("needles/*")):
        text = file.read_text().replace("benchmark_fingerprint: f", "benchmark_fingerprint: '012'")
        file.write_text(text.replace('"f"', '"012"'))
    assert build(folder).charts


@pytest.mark.parametrize(("died", "n"), [(0, 1), (3, 7), (50, 50), (1, 2)])
def test_interval_is_wilsons(died, n):
    interval = binomtest(died, n).proportion_ci(0.95, method="wilson")
    assert failures.wilson(died / n, n) == pytest.approx((interval.low, interval.high), abs=1e-6)
