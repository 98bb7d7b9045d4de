"""Cell folders are read back whole, or the message says which one is not."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sparsekv.errors import UserError
from sparsekv.evaluation.comparison.results import load_results
from tests.cells import write_cell


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    return write_cell(tmp_path, "snapkv:window_size=32", 0.5, {"vt": [10, 20], "qa": [30]})


def test_scores_are_read(cell: Path) -> None:
    results = load_results(cell.parent)
    assert results.scores.sort_values("row").score.tolist() == [10, 20, 30]
    assert results.scores.sort_values("row").task.tolist() == ["vt", "vt", "qa"]
    kept = results.cells.iloc[0]
    assert (kept.benchmark, kept.data_dir, kept.model, kept.adapter) == ("ruler-local", "4096", "tiny", "")
    assert (kept.press, kept.compression_ratio, kept.reason) == ("snapkv:window_size=32", 0.5, "")
    assert (kept.seed, kept.commit) == (0, "abc1234")


def test_headline_is_the_first_metric_that_a_task_has(tmp_path: Path) -> None:
    scores = {"qa": [{"f1": 1, "exact": 0}], "summary": [{"rouge": 5}]}
    write_cell(tmp_path, "no_press", 0.0, scores, metrics=("f1", "exact", "rouge"))
    table = load_results(tmp_path).scores
    assert set(table[table.headline.astype(bool)].metric) == {"f1", "rouge"}
    assert len(table) == 3


@pytest.mark.parametrize("task", ["NA", "nan", "null", "None", "", "007"])
def test_a_task_may_be_called_as_missing_values_are(tmp_path: Path, task: str) -> None:
    write_cell(tmp_path, "no_press", 0.0, {task: [{"a": 1}], "qa": [{"b": 2}]}, metrics=("a", "b"))
    scores = load_results(tmp_path).scores
    assert dict(zip(scores.task, scores.score, strict=True)) == {task: 1, "qa": 2}  # no score where there is none


def test_cells_without_scores_say_why(cell: Path) -> None:
    out = cell.parent
    for press, leave in (("kvzip", None), ("duo", "reason")):
        folder = write_cell(out, press, 0.5, {"vt": [1]})
        (folder / "profile.json").unlink()
        if leave:
            (folder / "unavailable.json").write_text(json.dumps({"reason": "needs a file from the hub"}))
    write_cell(out, "knorm", 0.5, {"vt": [{}]}, metrics=())
    reasons = load_results(out).cells.set_index("press").reason
    assert reasons["kvzip"] == "not finished"
    assert reasons["duo"] == "needs a file from the hub"
    assert "not public" in reasons["knorm"]
    assert reasons["snapkv:window_size=32"] == ""
    assert set(load_results(out).scores.press) == {"snapkv:window_size=32"}


def test_other_files_are_no_cells(cell: Path) -> None:
    (cell.parent / "config.yaml").write_text("a: run's own")
    (cell.parent / ".locks").mkdir()
    assert len(load_results(cell.parent).cells) == 1
    with pytest.raises(UserError, match="no cell folder"):
        load_results(cell.parent / ".locks")


def test_query_aware_cells_are_a_benchmark_of_their_own(cell: Path) -> None:
    twin = write_cell(cell.parent / "q", "snapkv:window_size=32", 0.5, {"vt": [1]}, query_aware=True)
    twin.rename(cell.parent / f"{twin.name}__query_aware")
    assert set(load_results(cell.parent).cells.benchmark) == {"ruler-local", "ruler-local (query-aware)"}


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("predictions.csv", "", "No columns"),
        ("predictions.csv", "row,generation,task,score:m\n", "no row"),
        ("predictions.csv", "row,task,score:m\n0,vt,1\n", "no column generation"),
        ("predictions.csv", "row,generation,task,score:m\n0,0,vt,1\n1,0,vt,\n", "row 1 has no score"),
        ("predictions.csv", "row,generation,task,score:m\n0,0,vt,inf\n", "row 0 has no score"),
        ("predictions.csv", "row,generation,task,score:m\n0,0,vt,oops\n", "could not convert"),
        ("predictions.csv", "row,generation,task,context,score:m\n0,0,vt,a text,1\n", "invalid literal"),
        ("predictions.csv", "row,generation,task,score:m\n0,0,vt,1\n0,0,vt,1\n", "row 0 is there twice"),
        ("predictions.csv", "row,generation,task,score:m\n0,0,vt,1,9,9,9\n1,0\n0,0,0,0,0,0,0,0,0\n", "corrupt"),
        ("profile.json", '{"commit": ', "Expecting value"),
        ("profile.json", "[]", "corrupt"),
        ("config.yaml", "dataset: ruler\n", "lacks 'sparsekv'"),
        ("config.yaml", "dataset: ruler\npress_name: snapkv\n", "not written by `sparsekv eval`"),
        ("config.yaml", "a: [", "corrupt"),
        ("config.yaml", "", "corrupt"),
    ],
)
def test_corrupt_cell_is_named(cell: Path, file: str, text: str, reason: str) -> None:
    (cell / file).write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        load_results(cell.parent)
    assert str(cell / file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["predictions.csv", "profile.json", "config.yaml"])
def test_a_folder_in_the_place_of_a_file_is_named(cell: Path, file: str) -> None:
    (cell / file).unlink()
    (cell / file).mkdir()
    with pytest.raises(UserError, match=rf"^{cell / file}: it cannot be read \(Is a directory\)$"):
        load_results(cell.parent)


def test_cell_without_configuration_is_corrupt(cell: Path) -> None:
    (cell / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"snapkv.*no config\.yaml"):
        load_results(cell.parent)


def test_the_same_cell_twice_is_refused(cell: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(cell, cell.parent / "runs" / name / cell.name)
    assert len(load_results(cell.parent).cells) == 1  # what lies deeper is another run's
    with pytest.raises(UserError, match="the same cell in two folders"):
        load_results(cell.parent / "runs")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"benchmark_fingerprint": "g"}, "benchmark_fingerprint is g, but f"),
        ({"benchmark_fingerprint": "g", "num_samples": 3}, "num_samples is 3, but None"),
        ({"chat_template": False}, "chat_template is False"),
    ],
)
def test_cells_of_other_rows_are_refused(cell: Path, settings: dict, key: str) -> None:
    other = write_cell(cell.parent, "tova", 0.5, {"vt": [1, 2], "qa": [3]}, **settings)
    with pytest.raises(UserError, match=key) as caught:
        load_results(cell.parent)
    assert str(other) in str(caught.value)
    assert str(cell) in str(caught.value)


def test_another_way_to_choose_the_same_rows_is_accepted(cell: Path) -> None:
    write_cell(cell.parent, "tova", 0.5, {"vt": [1, 2], "qa": [3]}, num_samples=2, dtype="float32")
    assert len(load_results(cell.parent).cells) == 2


def test_yaml_numbers_and_names_are_text(cell: Path) -> None:
    config = yaml.safe_load((cell / "config.yaml").read_text())
    assert config["data_dir"] == 4096
    config["sparsekv"]["model"] = 135
    (cell / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_results(cell.parent).runs() == [("135", "")]
