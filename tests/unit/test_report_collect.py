"""What a report finds in folders, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from cells import write_cell
from evidence import make_evidence, write_training

from sparsekv.errors import UserError
from sparsekv.report.collect import collect
from sparsekv.report.sections import headline


def write_run(folder: Path, **options) -> Path:
    """A finished run of two cells."""
    write_cell(folder, "no_press", 0.0, {"vt": [100, 50]}, **options)
    write_cell(folder, "snapkv", 0.5, {"vt": [50, 50]}, **options)
    return folder


def test_everything_below_a_folder_is_found(tmp_path):
    found = collect([make_evidence(tmp_path)])
    assert list(found.runs) == ["base", "control", "trained"]
    assert [run.folder for run in found.runs.values()] == [tmp_path / "evaluation" / name for name in found.runs]
    assert all(len(run.views) == 1 for run in found.runs.values())
    assert [analysis.role for analysis in found.analyses] == ["trained"]
    assert set(found.analyses[0].summary.run) == {"base", "control", "trained"}
    assert [(each.name, each.config["control"]) for each in found.trainings] == [("control", True), ("trained", False)]
    assert [each.folder for each in found.attention] == [tmp_path / "analysis"]
    assert found.model == "tiny"


def test_a_folder_named_twice_is_read_once(tmp_path, monkeypatch):
    make_evidence(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = collect([Path("evaluation/base"), Path("evaluation"), Path("../") / tmp_path.name, tmp_path])
    assert list(found.runs) == ["base", "control", "trained"]
    assert len(found.trainings) == 2


def test_the_adapters_own_record_says_whether_it_is_a_control(tmp_path):
    for name, control in (("a", True), ("b-control", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eit_config.json").write_text(json.dumps({"config": {"control": control}}))
        write_run(tmp_path / "results" / f"of-{name[0]}", adapter=str(tmp_path / name))
    found = collect([tmp_path / "results"])
    assert {role: run.folder.name for role, run in found.runs.items()} == {"control": "of-a", "trained": "of-b"}


@pytest.mark.parametrize(
    ("folder", "adapter", "role"),
    [("x", None, "base"), ("control", "gone/final", "control"), ("x", "gone/my-control/final", "control")],
)
def test_names_say_it_where_the_record_is_out_of_reach(tmp_path, folder, adapter, role):
    write_run(tmp_path / folder, adapter=adapter)
    assert list(collect([tmp_path]).runs) == [role]


def test_several_trained_runs_are_each_compared_with_base(tmp_path):
    write_run(tmp_path / "base")
    for name in ("short", "long"):
        write_run(tmp_path / name, adapter=f"{name}/final")
    found = collect([tmp_path])
    assert set(found.runs) == {"base", "short", "long"}
    assert {analysis.role for analysis in found.analyses} == {"short", "long"}
    assert all(set(analysis.summary.run) == {"base", analysis.role} for analysis in found.analyses)


def test_trained_runs_of_one_name_are_told_apart_by_their_adapters(tmp_path):
    for number in (1, 2):
        write_run(tmp_path / str(number) / "trained", adapter=f"adapter{number}")
    assert set(collect([tmp_path]).runs) == {"adapter1", "adapter2"}


def test_base_and_adapter_in_one_folder(tmp_path):
    write_run(tmp_path, model="tiny")
    for press, ratio in (("no_press", 0.0), ("snapkv", 0.5)):
        made = write_cell(tmp_path / "adapted", press, ratio, {"vt": [100, 50]}, adapter="a/final")
        shutil.move(made, tmp_path / f"{made.name}__adapted")
    (tmp_path / "adapted").rmdir()
    assert list(collect([tmp_path]).runs) == ["base", "trained"]


def test_a_run_that_lacks_a_benchmark_gets_a_sentence(tmp_path):
    write_run(tmp_path / "base")
    write_run(tmp_path / "trained", adapter="a")
    write_cell(tmp_path / "base", "no_press", 0.0, {"text": [1, 2]}, data=("perplexity", None), metrics=("nll",))
    evidence = collect([tmp_path])
    assert "trained has no finished cell of perplexity" in headline.build(evidence).intro


def test_trainings_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for number in ("1", "2"):
        write_training(tmp_path / number / "run", control=False)
    write_training(tmp_path / "other", control=False)
    names = {training.name for training in collect([tmp_path]).trainings}
    assert names == {str(tmp_path / "1" / "run"), str(tmp_path / "2" / "run"), "other"}


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    write_training(tmp_path / "run", control=False)
    whole = collect([tmp_path]).trainings[0].metrics
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    assert collect([tmp_path]).trainings[0].metrics.equals(whole)


# ---- refused ----


def two(tmp_path: Path, first: dict, second: dict) -> None:
    write_run(tmp_path / "one", **first)
    write_run(tmp_path / "two", **second)


def nothing_finished(tmp_path: Path) -> None:
    (write_cell(tmp_path / "base", "no_press", 0.0, {"vt": [1]}) / "predictions.csv").unlink()


def corrupt(file: str, text: str):
    def make(tmp_path: Path) -> None:
        make_evidence(tmp_path)
        (tmp_path / file).write_text(text)

    return make


def bad_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "eit_config.json").write_text('{"config": 5}')
    write_cell(tmp_path / "run", "no_press", 0.0, {"vt": [1]}, adapter=str(tmp_path / "adapter"))


def not_text(tmp_path: Path) -> None:
    make_evidence(tmp_path)
    (tmp_path / "trained" / "eit_config.json").write_bytes(b"\xff")


def other_version(tmp_path: Path) -> None:
    make_evidence(tmp_path)
    file = tmp_path / "analysis" / "attention_analysis.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}))


def other_models_training(tmp_path: Path) -> None:
    write_run(tmp_path / "base", model="another")
    write_training(tmp_path / "trained", control=False)


REFUSED = {
    "empty": (lambda path: None, "nothing to report"),
    "nothing finished": (nothing_finished, "nothing to report"),
    "two bases": (lambda path: two(path, {}, {}), "one and .*two: both hold base"),
    "two controls": (
        lambda path: two(path, {"adapter": "a/control"}, {"adapter": "b/control"}),
        "one and .*two: both hold control",
    ),
    "other models": (lambda path: two(path, {}, {"model": "large", "adapter": "a"}), "two is of large, .*one of tiny"),
    "training of another model": (other_models_training, "trained is of tiny, .*base of another"),
    "no benchmark in common": (
        lambda path: two(path, {}, {"data": ("ruler-local", 512), "adapter": "a"}),
        "one and .*two: no benchmark in common",
    ),
    "other rows": (lambda path: two(path, {}, {"benchmark_fingerprint": "g", "adapter": "a"}), "benchmark_fingerprint"),
    "corrupt record": (corrupt("trained/eit_config.json", "{"), "eit_config.json: corrupt"),
    "a record that is no text": (not_text, "eit_config.json: corrupt"),
    "a record of nothing": (corrupt("trained/eit_config.json", "[]"), "eit_config.json: corrupt"),
    "a record without options": (corrupt("trained/eit_config.json", "{}"), "eit_config.json: corrupt"),
    "an adapter's record without options": (bad_adapter, "adapter/eit_config.json: corrupt"),
    "a line without a step": (corrupt("trained/metrics.jsonl", '{"ce": 1}\n'), "metrics.jsonl: corrupt"),
    "corrupt metrics": (corrupt("trained/metrics.jsonl", '{"step"\n'), "metrics.jsonl: corrupt"),
    "corrupt metrics of another kind": (corrupt("trained/metrics.jsonl", "3\n"), "metrics.jsonl: corrupt"),
    "corrupt analysis": (corrupt("analysis/attention_analysis.json", "{"), "attention_analysis.json: corrupt"),
    "corrupt heads": (corrupt("analysis/attention_analysis.parquet", "x"), "attention_analysis.parquet: corrupt"),
    "other schema version": (other_version, "attention_analysis.json: its schema_version is 99"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path, name):
    make, message = REFUSED[name]
    make(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        collect([tmp_path])
    assert "\n" not in str(raised.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        collect([tmp_path / "nowhere"])


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "compare.md").write_text("")
    with pytest.raises(UserError, match=r"compare\.md: is a file; name folders"):
        collect([tmp_path / "compare.md"])


def test_one_of_two_folders_with_nothing_in_it_is_named(tmp_path):
    write_run(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: nothing to report"):
        collect([tmp_path / "base", tmp_path / "empty"])


def test_the_same_model_under_two_paths(tmp_path):
    two(tmp_path, {"model": "tiny"}, {"model": "models/tiny", "adapter": "a"})
    collect([tmp_path])
