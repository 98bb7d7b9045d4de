"""What the training and attention charts and the token viewer take from their files."""

import base64
import dataclasses
import gzip
import json
import re

import evidence
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from sparsekv.analysis.summary import CLASS_FIGURE
from sparsekv.errors import UserError
from sparsekv.evaluation.matrix.views import load_view, save_view
from sparsekv.report import render
from sparsekv.report.collect import Evidence, collect
from sparsekv.report.sections import attention, training, viewer
from sparsekv.style import paper_style

NOTHING = Evidence({}, [], [], [])


@pytest.fixture
def results(tmp_path):
    return evidence.make_evidence(tmp_path / "results")


def charts(section):
    return {chart.name: chart for chart in section.charts}


@pytest.mark.parametrize("section", [training, attention])
def test_every_chart_draws_for_paper_and_names_its_files(section, results):
    made = section.build(collect([results]))
    assert made.charts
    assert not made.missing
    for chart in made.charts:
        assert chart.sources
        assert all(file.is_file() for file in chart.sources)
        assert chart.page.data
        assert len(chart.data)
        figure = Figure()
        with paper_style():
            chart.draw(figure)
        assert figure.axes or figure.subfigs


@pytest.mark.parametrize("section", [training, attention])
def test_nothing_to_show_is_a_sentence(section):
    made = section.build(NOTHING)
    assert not made.charts
    assert "sparsekv" in made.missing


def test_training_points_are_the_lines_of_the_metrics(results):
    made = charts(training.build(collect([results])))
    data = made["training_perplexity"].data
    for run, last in (("control", 18.0), ("trained", 10.0)):
        rows = data[(data.training == run) & (data.figure == "eval_evicted_ppl")]
        assert rows.step.tolist() == [0, 4]
        assert rows.value.tolist() == [21.0, last]
    steps = made["training_keep_ratio"].data.query("training == 'trained' and figure == 'actual_keep_ratio'")
    assert steps.value.tolist() == [1 - step / 8 for step in range(1, 5)]


def test_a_training_without_a_figure_has_no_panel_for_it(results):
    for file in results.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if not key.startswith("eval")} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    made = charts(training.build(collect([results])))
    assert "training_perplexity" not in made
    assert "training_loss" in made


def test_attention_charts_show_the_numbers_of_the_files(results):
    collected = collect([results])
    made = charts(attention.build(collected))
    analysis, heads = collected.attention[0].analysis, collected.attention[0].heads
    bars = made["attention_classes"].data.set_index(["run", "class"])
    for run in analysis["runs"]:
        assert bars.loc[(run, "punctuation"), "mean"] == analysis["overall"][run][f"{CLASS_FIGURE}.punctuation"]["mean"]
        assert (run, "number") not in bars.index  # no row held one
    grid = made["attention_class_layers"].page.data
    for number, run in enumerate(analysis["runs"]):
        rows = list(grid[number].y)
        shown = np.exp2(np.array(grid[number].z, dtype=float)[rows.index("content")])
        assert shown == pytest.approx(analysis["layers"][run][f"{CLASS_FIGURE}.content"]["mean"])
        concentration = np.array(made["attention_concentration"].page.data[number].z, dtype=float)
        table = heads[(heads.run == run) & (heads.figure == "tokens_for_80")]
        assert concentration == pytest.approx(table["mean"].to_numpy().reshape(evidence.LAYERS, 4))
    distance = made["attention_distance"].data.query("run == 'adapter'")
    assert distance["mean"].tolist() == [
        analysis["overall"]["adapter"][f"distance_share.{start}"]["mean"] for start in distance["from"]
    ]
    assert distance["to"].tolist() == [*(distance["from"] - 1)[1:], analysis["max_len"] - 1]


def test_without_an_adapter_there_is_one_run(tmp_path):
    evidence.write_analysis(tmp_path / "one", runs=("base",))
    made = attention.build(collect([tmp_path]))
    assert all(set(chart.data.run) == {"base"} for chart in made.charts)
    assert "moved" not in made.intro


def test_several_analyses_have_charts_of_their_own(results):
    evidence.write_analysis(results / "again", runs=("base",))
    names = [chart.name for chart in attention.build(collect([results])).charts]
    assert len(names) == len(set(names)) == 2 * len(attention.CHARTS)


def test_analyses_in_folders_of_one_name_are_told_apart(tmp_path):
    for place in ("one", "two"):
        evidence.write_analysis(tmp_path / place / "my <attention>")
    charts = [chart for section in render.build(collect([tmp_path])).sections for chart in section.charts]
    assert len({chart.name for chart in charts}) == len({chart.title for chart in charts}) == 2 * len(attention.CHARTS)
    assert all(re.fullmatch(r"[\w.-]+", chart.name) for chart in charts)


def test_a_run_that_only_a_later_panel_has_is_in_the_legend(results):
    file = results / "control" / "metrics.jsonl"
    lines = [{key: value for key, value in json.loads(line).items() if key != "ce"} for line in file.open()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = charts(training.build(collect([results])))["training_loss"]
    named = [trace.name for trace in made.page.data if trace.showlegend]
    assert sorted(named) == ["control", "trained"]
    figure = Figure()
    with paper_style():
        made.draw(figure)
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert [text.get_text() for legend in legends for text in legend.get_texts()] == ["trained", "control"]


def payload(results):
    return json.loads(viewer.build_viewer(collect([results]))[0])


def test_viewer_payload_is_the_views_and_the_answers(results):
    shown = payload(results)
    assert [view["run"] for view in shown["views"]] == list(evidence.RUNS)
    for number, view in enumerate(shown["views"]):
        made = evidence.make_view(number, "")
        assert view["tokens"] == made.tokens
        for cell, wanted in zip(view["cells"], made.cells, strict=True):
            bits = np.unpackbits(np.frombuffer(base64.b64decode(cell["kept"]), np.uint8), count=wanted.kept.size)
            assert (bits.reshape(wanted.kept.shape) == wanted.kept).all()
            folder = results / "evaluation" / view["run"]
            name = f"ruler-local__64__tiny__{cell['press']}__{cell['compression_ratio']:.2f}"
            line = pd.read_csv(folder / name / "predictions.csv").query(f"row == {made.row}").iloc[0]
            assert (cell["answer"], cell["score"]) == (line.predicted_answer, line["score:string_match"])
        assert view["full"]["answer"].startswith("no_press")


def test_viewer_payload_cannot_end_its_script(results):
    assert "<" not in viewer.build_viewer(collect([results]))[0]


def test_viewer_leaves_out_what_does_not_fit_and_says_so(results, monkeypatch):
    whole = payload(results)["views"][0]
    room = len(whole["received"]) + 2 * len(whole["cells"][0]["kept"])
    monkeypatch.setattr(viewer, "BUDGET", 3 * room)
    view = payload(results)["views"][0]
    assert [(cell["press"], cell["compression_ratio"]) for cell in view["cells"]] == [("knorm", 0.5), ("snapkv", 0.5)]
    hidden = {
        (cell["press"], cell["compression_ratio"]) for cell in view["not_shown"] if cell["reason"] == viewer.LEFT_OUT
    }
    assert hidden == {("knorm", 0.25), ("snapkv", 0.25)}
    monkeypatch.setattr(viewer, "BUDGET", 3 * (room - 1))
    assert all(len(view["cells"]) == 1 for view in payload(results)["views"])


def test_viewer_never_takes_more_than_its_room(results, monkeypatch):
    room = len(payload(results)["views"][0]["received"]) + len(payload(results)["views"][0]["cells"][0]["kept"])
    monkeypatch.setattr(viewer, "BUDGET", 2 * room)
    text, left_out = viewer.build_viewer(collect([results]))
    assert [view["run"] for view in json.loads(text)["views"]] == ["base", "control"]
    assert [path.parts[-3] for path in left_out] == ["trained"]
    monkeypatch.setattr(viewer, "BUDGET", room - 1)
    page = render.build(collect([results]))
    assert page.viewer == ""
    (section,) = [section for section in page.sections if section.key == "viewer"]
    assert all(str(path) in section.missing for path in results.glob("evaluation/*/views/*"))


def test_viewer_shows_answers_as_they_were_written(results):
    for file in results.glob("evaluation/base/*/predictions.csv"):
        pd.read_csv(file).assign(predicted_answer="0042").to_csv(file, index=False)
    (view,) = [view for view in payload(results)["views"] if view["run"] == "base"]
    assert (view["full"]["answer"], view["cells"][0]["answer"]) == ("0042", "0042")


def test_viewer_shows_nothing_of_another_run_of_the_folder(results):
    view = evidence.make_view(0, "")
    other = dataclasses.replace(view, benchmark="of-another-run")
    save_view(results / "evaluation" / "base" / "views" / "other.json.gz", other)
    assert len(payload(results)["views"]) == len(evidence.RUNS)


def test_a_view_of_other_rows_is_one_line(results):
    file = next(results.glob("evaluation/base/views/*"))
    save_view(file, dataclasses.replace(load_view(file), row=12))  # its task is another
    with pytest.raises(UserError, match=rf"^{file}: of other rows than [^\n]+$"):
        viewer.build_viewer(collect([results]))


def test_viewer_without_views_is_empty(results):
    assert viewer.build_viewer(NOTHING) == ("", [])
    for file in results.glob("evaluation/*/views/*"):
        file.unlink()
    assert viewer.build_viewer(collect([results])) == ("", [])


def test_a_view_of_another_version_is_one_line(results):
    file = next(results.glob("evaluation/base/views/*"))
    assert load_view(file).tokens == evidence.TOKENS
    content = json.loads(gzip.decompress(file.read_bytes()))
    file.write_bytes(gzip.compress(json.dumps({**content, "schema_version": 99}).encode()))
    with pytest.raises(UserError, match=r"schema_version 99"):
        viewer.build_viewer(collect([results]))
