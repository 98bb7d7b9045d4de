"""The sections made of cells: each number on the page against the files."""

import json
from pathlib import Path

import numpy as np
import pytest
from cells import write_cell
from matplotlib.figure import Figure

from sparsekv.report.collect import Evidence, collect
from sparsekv.report.sections import cost, differences, headline, retention, runs
from sparsekv.style import paper_style

NOTHING = Evidence({}, [], [], [])
TEXT = {"data": ("perplexity", None), "metrics": ("nll",)}
GOOD, BAD = [100.0] * 9 + [80.0], [0.0] * 9 + [20.0]


def write_runs(root: Path) -> Evidence:
    """Base, control and trained on two tasks and on text; knorm at 0.5 ruins all but the trained one on one task."""
    for run, adapter in (("base", None), ("control", "c/control"), ("trained", "t/final")):
        evicted = GOOD if run == "trained" else BAD
        write_cell(root / run, "no_press", 0.0, {"vt": GOOD, "qa": GOOD}, adapter=adapter)
        write_cell(root / run, "knorm", 0.5, {"vt": evicted, "qa": BAD}, adapter=adapter)
        write_cell(root / run, "knorm", 0.25, {"vt": GOOD, "qa": GOOD}, adapter=adapter)
        write_cell(root / run, "no_press", 0.0, {"text": [2.0, 2.1]}, adapter=adapter, **TEXT)
        nll = 2.5 if run == "trained" else 3.0
        write_cell(root / run, "snapkv", 0.5, {"text": [nll, nll + 0.1]}, adapter=adapter, **TEXT)
    return collect([root])


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("results"))


@pytest.mark.parametrize("section", [headline, retention, differences, cost])
def test_a_sentence_where_there_is_nothing(section):
    made = section.build(NOTHING)
    assert made.missing.endswith(".")
    assert not made.charts
    assert not made.tables


# ---- headline ----


def test_the_headline_is_that_of_compare(evidence):
    ruler = next(table for table in headline.build(evidence).tables if "ruler" in table.name)
    assert ruler.header == ["", "base", "control", "trained"]
    cells = {row[0]: row[1:] for row in ruler.rows}
    assert [cell.split()[0] for cell in cells["full cache"]] == ["98.0"] * 3
    assert cells["evicted cells against base"] == ["–", "▲ 0 ▼ 0 = 2", "▲ 1 ▼ 0 = 1"]


def test_big_figures(evidence):
    perplexity, ruler = sorted(headline.figures(evidence), key=lambda figure: figure.label)
    assert ruler.label == "ruler-local 4096: mean retention"
    assert ruler.value == "51% → 76%"  # means of (1, 2/98) and of (1, 50/98)
    assert "n = 20" in ruler.detail
    assert "control 51%" in ruler.detail
    closed = 100 * (50 - 2) / (98 - 2)
    assert f"closed by {closed:.0f}%" in ruler.detail
    assert perplexity.value == f"{np.exp(-1):.0%} → {np.exp(-0.5):.0%}"


def test_big_figures_of_base_alone(tmp_path):
    write_cell(tmp_path, "no_press", 0.0, {"vt": [100, 100]})
    write_cell(tmp_path, "knorm", 0.5, {"vt": [100, 50]})
    (figure,) = headline.figures(collect([tmp_path]))
    assert figure.value == "75%"
    assert "→" not in figure.detail


def test_no_big_figure_without_retention(tmp_path):
    write_cell(tmp_path, "no_press", 0.0, {"vt": [0, 0]})
    write_cell(tmp_path, "knorm", 0.5, {"vt": [0, 50]})
    assert headline.figures(collect([tmp_path])) == []


# ---- retention ----


def test_curves_start_at_the_full_cache(evidence):
    made = {chart.name: chart for chart in retention.build(evidence).charts}
    assert set(made) == {"retention_trained_perplexity_nll", "retention_trained_ruler-local_4096_string_match"}
    data = made["retention_trained_ruler-local_4096_string_match"].data
    for run, half in (("base", 2.0), ("control", 2.0), ("trained", 50.0)):
        curve = data[(data.run == run) & (data.press == "knorm")]
        assert curve.compression_ratio.tolist() == [0, 0.25, 0.5]
        assert curve.score.tolist() == pytest.approx([98, 98, half])
        assert (curve.ci_low.fillna(curve.score) <= curve.score).all()


def test_the_page_draws_what_the_table_says(evidence):
    for chart in retention.build(evidence).charts:
        lines = [trace for trace in chart.page.data if trace.mode == "lines+markers"]
        drawn = {(trace.name, tuple(trace.x), tuple(trace.y)) for trace in lines}
        groups = chart.data.groupby(["run", "press"])
        assert drawn == {(run, tuple(group.compression_ratio), tuple(group.score)) for (run, _), group in groups}
        assert len({trace.legendgroup for trace in lines if trace.showlegend}) == 3
        assert all(file.is_file() for file in chart.sources)


# ---- differences ----


def test_differences_are_gains_with_marks_where_chance_does_not_explain_them(evidence):
    made = {chart.name: chart for chart in differences.build(evidence).charts}
    assert set(made) == {
        f"differences_trained_{data}_{other}"
        for data in ("perplexity", "ruler-local_4096")
        for other in ("base", "control")
    }
    chart = made["differences_trained_ruler-local_4096_base"]
    cell = chart.data.set_index(["cell", "task"])
    assert list(dict.fromkeys(chart.data.cell)) == ["full cache", "knorm, 25%", "knorm, 50%"]
    assert cell.gain["knorm, 50%", "vt"] == 96
    assert cell.gain["knorm, 50%", "all tasks"] == 48
    assert cell.gain["knorm, 50%", "qa"] == cell.gain["full cache", "vt"] == 0
    assert cell.verdict["knorm, 50%", "vt"] == "better"
    assert cell.verdict["knorm, 50%", "qa"] == "no difference"
    (heatmap,) = chart.page.data
    where = list(heatmap.y).index("knorm, 50%"), list(heatmap.x).index("vt")
    assert heatmap.z[where] == 96
    assert heatmap.text[where].startswith("▲")
    p = cell.p["knorm, 50%", "vt"]
    assert f"p {p:.3f}" in heatmap.customdata[where]
    assert -heatmap.zmin == heatmap.zmax == 96
    assert all("base" in str(file) or "trained" in str(file) for file in chart.sources)


def test_less_is_a_gain_where_lower_is_better(evidence):
    chart = next(chart for chart in differences.build(evidence).charts if "perplexity_base" in chart.name)
    cell = chart.data.set_index("cell").loc["snapkv, 50%"]
    assert (cell.difference, cell.gain) == (pytest.approx(-0.5), pytest.approx(0.5))
    assert set(chart.data.task) == {"text"}, "one task is its own average"


def test_ratios_and_tasks_that_look_alike_stay_apart(tmp_path):
    tasks = {f"{'long' * 10} {end}": GOOD for end in "ab"}
    for run, adapter in (("base", None), ("trained", "t/final")):
        write_cell(tmp_path / run, "no_press", 0.0, tasks, adapter=adapter)
        for ratio in (0.125, 0.13, 0.29):
            write_cell(tmp_path / run, "knorm", ratio, tasks, adapter=adapter)
    (chart,) = differences.build(collect([tmp_path])).charts
    (grid,) = chart.page.data
    assert list(grid.y) == ["full cache", "knorm, 12.5%", "knorm, 13%", "knorm, 29%"]
    assert list(grid.x) == [*tasks, "all tasks"]
    assert chart.page.layout.xaxis.tickvals == grid.x
    assert [len(name) for name in chart.page.layout.xaxis.ticktext] == [differences.LONGEST] * 2 + [len("all tasks")]


def test_a_run_without_the_first_press_is_in_the_legend(tmp_path):
    for run, adapter, presses in (("base", None, ("keydiff", "knorm")), ("trained", "t/final", ("knorm",))):
        for press, ratio in (("no_press", 0.0), *((press, 0.5) for press in presses)):
            write_cell(tmp_path / run, press, ratio, {"vt": GOOD}, adapter=adapter)
    (chart,) = retention.build(collect([tmp_path])).charts
    assert [trace.name for trace in chart.page.data if trace.showlegend] == ["base", "trained"]
    figure = Figure()
    with paper_style():
        chart.draw(figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["base", "trained"]


def test_a_headline_names_the_folders_of_its_own_runs(tmp_path):
    for run, adapter in (("base", None), ("one", "one/final"), ("two", "two/final")):
        write_cell(tmp_path / run, "no_press", 0.0, {"vt": GOOD}, adapter=adapter)
    sources = [[path.name for path in table.sources] for table in headline.build(collect([tmp_path])).tables]
    assert sources == [["base", "one"], ["base", "two"]]


def test_long_names_leave_room():
    assert differences.shortened("niah_single_2") == "niah_single_2"
    assert len(differences.shortened("x" * 99)) == differences.LONGEST


# ---- cost and runs ----


def test_costs_are_those_of_the_profile(tmp_path):
    folder = write_cell(tmp_path, "knorm", 0.5, {"vt": [100]})
    write_cell(tmp_path, "no_press", 0.0, {"vt": [100]})
    profile = {"kv_bytes": {"full": 3 * 2**20, "requested": 2**20, "logical": 2**20, "physical": 2**19}}
    profile |= {"prefill_seconds": 1.25, "decode_seconds": 0.5, "tokens_per_second": None}
    profile |= {"peak_memory_bytes": 5 * 2**30, "device": "cpu", "commit": "abc"}
    (folder / "profile.json").write_text(json.dumps(profile))
    (table,) = cost.build(collect([tmp_path])).tables
    assert [row[:2] for row in table.rows] == [["full cache", "base"], ["knorm, 50%", "base"]]
    assert table.rows[1][2:] == ["3.00", "1.00", "1.00", "0.50", "1.2", "0.5", "–", "5,120", "cpu"]
    assert table.sources[1] == folder / "profile.json"


def test_every_option_of_every_run_is_listed(evidence):
    (table,) = runs.build(evidence).tables
    assert table.header == ["", "base", "control", "trained"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["adapter"] == ["–", "c/control", "t/final"]
    assert rows["benchmark"] == ["perplexity, ruler-local"] * 3
    assert rows["commit"] == ["abc1234"] * 3
    assert rows["seed"] == ["0"] * 3
