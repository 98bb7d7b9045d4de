"""The folder of a cell: what is written when, what is read back, and what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.comparison.cell_files import FINISHED
from sparsekv.evaluation.comparison.results import load_results
from sparsekv.evaluation.matrix import cells as cells_module
from sparsekv.evaluation.matrix.cells import LOCKS, CellFolder, cell_name, check_names, differences
from sparsekv.evaluation.matrix.journal import Journal
from sparsekv.evaluation.matrix.predictions import profile

ROWS = 3
CONTEXTS = [0, 1, 0]  # their numbers


def benchmark() -> Benchmark:
    same = {"question": "q?", "answer": ["a", 'b"'], "max_new_tokens": 5}
    rows = [{"context": "cd"[CONTEXTS[row]] * 99, "task": f"t{row}", **same} for row in range(ROWS)]
    return Benchmark(
        name="mine",
        data_dir=None,
        rows=rows,
        score=lambda row: {"length": float(len(row["predicted_answer"])), f"own_{row['task']}": 1.0},
        metrics=lambda rows: {"answers": [row["predicted_answer"] for row in rows]},
    )


def config(**changes) -> dict:
    ours = {"model": "m", "adapter": None, "adapter_fingerprint": None, "seed": 0, "tasks": None}
    ours |= {"benchmark_fingerprint": "b", "num_samples": None}
    ours |= {key: changes.pop(key) for key in list(changes) if key in ours and key != "model"}
    values = {"dataset": "mine", "data_dir": None, "model": "m", "press_name": "snapkv", "compression_ratio": 0.5}
    return {**values, "query_aware": False, "press_init_command": "SnapKVPress()", **changes, "sparsekv": ours}


def record(row: int, generation: int = 0, **changes) -> dict:
    values = {"row": row, "generation": generation, "text": f"answer {row}\n,\r{generation}", "nll": None, "kl": None}
    kv_bytes = {"full": 100.0, "requested": 50.0, "logical": 48.0, "physical": 96.0}
    costs = {"num_tokens": 4, "kv_bytes": kv_bytes, "prefill_seconds": 0.5, "decode_seconds": 0.25}
    return {**values, **costs, "device": "cpu", "peak_memory_bytes": 1000 + row, **changes}


@pytest.fixture
def new(tmp_path):
    """Factory of objects for one cell, as several processes would have them; the folder of locks is there."""
    (tmp_path / LOCKS).mkdir()
    return lambda **changes: CellFolder(tmp_path, config(**changes), ROWS, 2)


def everything() -> list[dict]:
    return [record(row, generation) for row in range(ROWS) for generation in range(2)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- names ----


def test_names_are_those_of_kvpress():
    changes = {"data_dir": 4096, "model": "meta-llama/Llama-3", "press_name": "snapkv:window_size=32:kernel_size=7"}
    name = cell_name(config(**changes, compression_ratio=0.875))
    assert name == "mine__4096__meta-llama--Llama-3__snapkv_window_size=32_kernel_size=7__0.875"
    ratios = {0.999: "0.999", 0.3: "0.30", 0.0: "0.00", 0.1 + 0.2: "0.30000000000000004"}
    for ratio, written in ratios.items():
        assert cell_name(config(compression_ratio=ratio)).endswith(f"__{written}")
    assert cell_name(config(query_aware=True)) == "mine__m__snapkv__0.50__query_aware"
    assert "/" not in cell_name(config(data_dir="texts/a.txt"))


def test_two_cells_in_one_folder_are_refused(tmp_path):
    one, two = (CellFolder(tmp_path, config(max_new_tokens=most), ROWS) for most in (3, 4))
    check_names([one])
    with pytest.raises(UserError, match="max_new_tokens 3 and 4"):
        check_names([one, two])


def test_a_name_too_long_for_a_folder_is_the_models_fault(tmp_path):
    check_names([CellFolder(tmp_path, config(model="m" * 200), ROWS)])
    with pytest.raises(UserError, match=r"^--model mmm.* at most 240"):
        check_names([CellFolder(tmp_path, config(model="m" * 230), ROWS)])


# ---- the life of a cell ----


def test_from_the_first_answer_to_the_files(new):
    cell = new()
    cell.check()
    assert not cell.path.exists()
    cell.begin()
    cell.append([record(2), record(0, 1)])
    assert cell.missing(range(ROWS)) == {0, 1, 2}
    cell.append(each for each in everything() if each["row"])
    assert cell.missing(range(ROWS)) == {0}
    assert not cell.complete
    cell.append(everything())
    assert cell.complete
    cell.finish(benchmark())
    assert {path.name for path in cell.path.iterdir()} == {"config.yaml", *FINISHED}
    with (cell.path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["generation"]) for row in rows] == [(str(r), str(g)) for r in range(ROWS) for g in (0, 1)]
    assert [row["context"] for row in rows] == [str(r) for r in CONTEXTS for _ in (0, 1)]
    assert rows[3]["predicted_answer"] == "answer 1\n,\r1"
    assert json.loads(rows[3]["answer"]) == ["a", 'b"']
    assert rows[3]["score:length"] == str(float(len("answer 1\n,\r1")))
    assert (rows[3]["score:own_t1"], rows[3]["score:own_t2"]) == ("1.0", "")
    assert json.loads((cell.path / "metrics.json").read_text())["answers"][3] == "answer 1\n,\r1"
    new().check()


def test_rows_with_nothing_for_a_context_share_none():
    rows = [{**benchmark().rows[0], "context": text} for text in ("a", " ", "b", " ", "a", "")]
    assert replace(benchmark(), rows=rows).contexts == [0, 1, 2, 3, 0, 4]


def test_what_is_written_is_what_statistics_read(new, tmp_path):
    cell = new()
    cell.begin()
    cell.append(everything())
    cell.finish(benchmark())
    scores = load_results(tmp_path).scores
    assert len(scores[scores.metric == "length"]) == 2 * ROWS
    assert set(scores.press) == {"snapkv"}
    assert scores.groupby("row").context.unique().map(list).tolist() == [[number] for number in CONTEXTS]


def test_the_profile():
    answers = [*everything(), record(0, device="cuda", kv_bytes=dict.fromkeys(record(0)["kv_bytes"], 1.0))]
    found = profile(answers)
    assert found["kv_bytes"]["full"] == pytest.approx(601 / 7)
    assert (found["tokens"], found["rows"]) == (28, ROWS)
    assert (found["prefill_seconds"], found["decode_seconds"]) == (3.5, 1.75)
    assert found["tokens_per_second"] == 16
    assert found["peak_memory_bytes"] == 1002
    assert found["device"] == "cpu, cuda"


def test_the_order_of_answers_does_not_matter(tmp_path):
    written = []
    for name, answers in (("a", everything()), ("b", everything()[::-1])):
        (tmp_path / name / LOCKS).mkdir(parents=True)
        cell = CellFolder(tmp_path / name, config(), ROWS, 2)
        cell.begin()
        for answer in answers:
            cell.append([answer])
        cell.finish(benchmark())
        written.append(files(cell.path))
    assert written[0] == written[1]


def test_a_likelihood_has_scores_and_no_text(new):
    text = Benchmark("text", None, benchmark().rows, lambda row: {"nll": row["nll"], "kl": row["kl"]}, lambda rows: {})
    cell = new()
    cell.begin()
    cell.append(record(row, g, text=None, nll=1.5 + row, kl=0.25) for row in range(ROWS) for g in range(2))
    cell.finish(text)
    with (cell.path / "predictions.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["score:nll"], last["score:kl"], last["predicted_answer"]) == ("3.5", "0.25", "")
    assert "nll" not in last


def test_two_processes_see_each_other(new):
    one, two = new(), new()
    one.begin()
    two.begin()
    one.append([record(0), record(0, 1)])
    two.refresh()
    assert two.missing(range(ROWS)) == {1, 2}
    two.append(each for each in everything() if each["row"])
    two.finish(benchmark())
    before = files(two.path)
    one.refresh()
    assert one.complete
    one.finish(benchmark())
    assert files(one.path) == before


def test_answers_are_known_when_the_journals_vanish_while_they_are_read(new, monkeypatch):
    """Another process finishes the cell between the list of its journals and their reading."""
    one, two = new(), new()
    two.begin()
    two.append(everything())
    plain = Journal._news_of

    def late(self, file):
        monkeypatch.setattr(Journal, "_news_of", plain)
        two.finish(benchmark())
        return plain(self, file)

    monkeypatch.setattr(Journal, "_news_of", late)
    one.refresh()
    assert one.complete


def test_a_folder_whose_configuration_is_being_written_is_new(new):
    cell = new()
    cell.path.mkdir()
    (cell.path / ".config.yaml.abc").write_text("dataset: m")
    cell.check()
    cell.begin()
    new().check()


# ---- kills ----


@pytest.mark.parametrize("torn", ['{"row": 1, "gen', '{"row": 1, "generation": 0}', "\0\0\0"])
def test_a_torn_last_line_is_no_answer(new, torn):
    cell = new()
    cell.begin()
    cell.append([record(0), record(0, 1)])
    (journal,) = cell.path.glob("journal-*")
    journal.write_text(journal.read_text() + torn)
    again = new()
    again.check()
    assert again.missing(range(ROWS)) == {1, 2}
    again.append(each for each in everything() if each["row"])
    again.finish(benchmark())
    new().check()


def test_a_line_that_is_being_written_is_read_when_it_is_whole(new):
    cell, other = new(), new()
    cell.begin()
    file = cell.path / "journal-other.jsonl"
    line = json.dumps(record(1)) + "\n"
    for part in (line[:20], line[20:-1]):
        with file.open("a") as journal:
            journal.write(part)
        other.refresh()
        assert not other.answered
    with file.open("a") as journal:
        journal.write("\n")
    other.refresh()
    assert other.answered == {(1, 0)}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [*FINISHED, "journal", "rename"])
def test_a_kill_while_a_cell_is_finished(new, monkeypatch, moment):
    """Before each of its files, while one is half-written, and before the journals go: the next process repairs it."""
    whole = new()
    whole.begin()
    whole.append(everything())

    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "journal":
            patch.setattr(Path, "unlink", kill)
        elif moment == "rename":
            patch.setattr("os.replace", kill)
            patch.setattr("os.unlink", lambda path: None)
        else:
            for writer in ("write_text", "write_json"):
                plain = getattr(cells_module, writer)
                patch.setattr(
                    cells_module,
                    writer,
                    lambda path, value, plain=plain: kill() if path.name == moment else plain(path, value),
                )
        with pytest.raises(Killed):
            whole.finish(benchmark())
    again = new()
    again.check()
    assert again.complete
    again.finish(benchmark())
    assert {path.name for path in again.path.iterdir()} == {"config.yaml", *FINISHED}
    new().check()


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, r"seed 0, now 1"),
        ({"adapter": "x", "adapter_fingerprint": "f"}, r"adapter None, now 'x'"),
        ({"num_samples": 5, "benchmark_fingerprint": "c"}, r"num_samples None, now 5"),
        ({"benchmark_fingerprint": "c"}, r"benchmark_fingerprint 'b', now 'c'"),
        ({"max_new_tokens": 4}, r"max_new_tokens None, now 4"),
        ({"kvpress_version": "0.5.6"}, r"kvpress_version None, now '0\.5\.6'"),
    ],
)
def test_another_configuration_is_refused(new, changes, said):
    cell = new()
    cell.begin()
    cell.append([record(0)])
    before = files(cell.path)
    for look in ("check", "begin"):
        with pytest.raises(UserError, match=said) as refused:
            getattr(new(**changes), look)()
        assert "\n" not in str(refused.value)
        assert "--out" in str(refused.value)
    assert files(cell.path) == before


def test_what_was_begun_and_never_answered_is_said_to_be_empty(new):
    new().begin()
    with pytest.raises(UserError, match="now 1; it holds no answer yet: name another --out, or delete this folder"):
        new(seed=1).begin()


def test_what_may_change(new):
    """Another path to the same adapter, the number of samples that gives the same rows, how a press prints itself."""
    new(adapter="a", adapter_fingerprint="f").begin()
    new(adapter="b", adapter_fingerprint="f", num_samples=ROWS, press_init_command="SnapKVPress(…)").check()
    assert differences(config(device="cpu"), config(device="cuda")) == []


def damage(cell: CellFolder, what: str) -> None:
    if what == "truncated":
        text = (cell.path / "predictions.csv").read_text()
        (cell.path / "predictions.csv").write_text(text[: text.rindex("answer 2")])
    elif what == "no config":
        (cell.path / "config.yaml").unlink()
    elif what == "another's":
        (cell.path / "config.yaml").write_text("dataset: mine\n")
    elif what == "no mapping":
        (cell.path / "config.yaml").write_text("- 1\n")
    elif what == "no yaml":
        (cell.path / "config.yaml").write_bytes(b"a: [\xff")
    elif what == "no json":
        (cell.path / "metrics.json").write_text("{")
    elif what == "no metrics":
        (cell.path / "metrics.json").unlink()
    elif what == "columns":
        (cell.path / "predictions.csv").write_text("a,b\n1,2\n")
    elif what == "journal":
        for name in FINISHED:
            (cell.path / name).unlink()
        (cell.path / "journal-1.jsonl").write_text("nonsense\n" + json.dumps(record(0)) + "\n")
    else:
        for path in cell.path.iterdir():
            path.unlink()
        cell.path.rmdir()
        cell.path.write_text("a file")


@pytest.mark.parametrize("line", ['{"row": 0, "generation": 0}', "[1]", json.dumps({**record(0), "kv_bytes": 3})])
def test_a_line_that_lacks_what_a_prediction_has_is_refused(new, line):
    cell = new()
    cell.begin()
    (cell.path / "journal-a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="is no prediction; delete"):
        new().check()


def test_a_folder_is_no_journal(new):
    cell = new()
    (cell.path / "journal-a.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"corrupt \(no config"):
        cell.check()
    (cell.path / "journal-a.jsonl").rmdir()
    cell.begin()
    (cell.path / "journal-a.jsonl").mkdir()
    new().check()


def test_rows_that_are_not_the_benchmarks_are_named(new):
    cell = new()
    cell.begin()
    cell.append(everything())
    cell.finish(benchmark())
    table = pd.read_csv(cell.path / "predictions.csv")
    table.replace({"row": {2: 7}}).to_csv(cell.path / "predictions.csv", index=False)
    with pytest.raises(UserError, match=r"wrong rows: row (2|7), generation 0"):
        new().check()


KINDS = ("truncated", "no config", "another's", "no mapping", "no yaml", "no json", "no metrics", "columns", "journal")


@pytest.mark.parametrize("what", [*KINDS, "a file"])
def test_a_corrupt_folder_is_refused(new, what):
    cell = new()
    cell.begin()
    cell.append(everything())
    cell.finish(benchmark())
    new().check()
    damage(cell, what)
    with pytest.raises(UserError, match=r"corrupt \(.+\); delete|corrupt, .+; delete") as refused:
        new().check()
    assert str(cell.path) in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- presses that cannot run here ----


def test_an_unavailable_cell_is_tried_again(new, tmp_path):
    cell = new()
    cell.begin()
    cell.append([record(0)])
    cell.give_up("needs a file from the Hub")
    assert json.loads((cell.path / "unavailable.json").read_text()) == {"reason": "needs a file from the Hub"}
    assert load_results(tmp_path).cells.reason.tolist() == ["needs a file from the Hub"]
    again = new()
    again.check()
    assert again.missing(range(ROWS)) == {0, 1, 2}
    again.append(everything())
    again.finish(benchmark())
    assert {path.name for path in again.path.iterdir()} == {"config.yaml", *FINISHED}
