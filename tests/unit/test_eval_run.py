"""`sparsekv eval` on a tiny model: killed, stopped, shared and sharded runs end as the run that never was.

This file is also the program that the tests start as processes of their own: `test_eval_run.py OUT INPUTS KILL_AFTER`.
"""

import contextlib
import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pandas as pd
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny import save_tiny
from transformers import PreTrainedTokenizerFast

from sparsekv.adapters import attach_lora
from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.engine.work import FULL_CACHE, Cell
from sparsekv.evaluation.matrix import inputs as inputs_module
from sparsekv.evaluation.matrix import run as run_module
from sparsekv.evaluation.matrix.config import EvalConfig, RunConfig
from sparsekv.evaluation.matrix.encode import Encoder
from sparsekv.evaluation.matrix.jobs import Job
from sparsekv.evaluation.matrix.run import evaluate
from sparsekv.models import load_model
from sparsekv.progress import CountProgress

ROOT = Path(__file__).parents[2]
CONTEXTS, QUESTIONS = 9, 2
PRESSES = "snapkv:window_size=16,knorm,random"
CELLS = 1 + 3 * 2


def rows() -> list[dict]:
    """Two questions about each of some texts."""
    texts = [text[500:800] for text in topics.values() if len(text) > 800][:CONTEXTS]
    tail = {"answer_prefix": "Answer:", "answer": "e", "max_new_tokens": 6}
    return [
        {"context": text, "question": f"Question {number}?", "task": f"t{number}", **tail}
        for text in texts
        for number in range(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "base")
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder


def config(inputs: Path, out: Path, **changes) -> EvalConfig:
    values = {"benchmark": str(inputs / "mine.jsonl"), "presses": PRESSES, "ratios": "0.3,0.6", "device": "cpu"}
    if "runs" not in changes:
        values["model"] = str(inputs / "base")
    return EvalConfig(**{**values, "out": str(out), **changes})


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert evaluate(config(inputs, out)) is None
    return results(out)


def results(out: Path) -> dict[str, bytes]:
    """The predictions and metrics of all cells."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for name in ("predictions.csv", "metrics.json")
        for path in sorted(out.glob(f"*/{name}"))
    }


def journals(out: Path) -> Counter:
    """(cell, row, generation) → how often it was answered."""
    lines = [(path, json.loads(line)) for path in out.glob("*/journal-*") for line in path.read_text().splitlines()]
    return Counter((path.parent.name, record["row"], record["generation"]) for path, record in lines)


def every_file(out: Path) -> dict[Path, tuple[bytes, int]]:
    summary = {out / f"summary.{kind}" for kind in ("csv", "md", "parquet")}
    paths = (path for path in out.rglob("*") if path.is_file() and path not in summary and ".locks" not in path.parts)
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in the package catches it."""


@contextlib.contextmanager
def after_batches(count: int, action):
    """Inside, `action` is done before the batch after `count` batches is kept."""
    plain, seen = Job.keep, []

    def keep(self, batch, **measured):
        seen.append(batch)
        if len(seen) > count:
            action()
        plain(self, batch, **measured)

    Job.keep = keep
    try:
        yield
    finally:
        Job.keep = plain


def kill():
    raise Killed


# ---- results ----


def test_what_a_run_leaves(inputs, uninterrupted, tmp_path):
    assert len(uninterrupted) == 2 * CELLS
    texts = {name: data for name, data in uninterrupted.items() if name.endswith("csv")}
    assert len(set(texts.values())) == CELLS, "the presses make no difference here: nothing is shown by equal results"
    evaluate(config(inputs, tmp_path))
    assert results(tmp_path) == uninterrupted
    assert {path.name for path in tmp_path.glob("summary.*")} == {"summary.csv", "summary.md", "summary.parquet"}
    assert not list(tmp_path.glob("*/journal-*"))
    (folder,) = tmp_path.glob("*snapkv_window_size=16__0.60")
    profile = json.loads((folder / "profile.json").read_text())
    assert profile["rows"] == CONTEXTS * QUESTIONS
    assert 0 < profile["kv_bytes"]["logical"] < 0.5 * profile["kv_bytes"]["full"]
    assert profile["peak_memory_bytes"] > 2**20
    assert profile["prefill_seconds"] > 0


def test_a_second_run_does_nothing(inputs, tmp_path, monkeypatch, caplog):
    evaluate(config(inputs, tmp_path))
    before = every_file(tmp_path)
    monkeypatch.setattr(run_module, "load_model", lambda *args: pytest.fail("loaded the model"))
    with caplog.at_level("INFO", logger="sparsekv"):
        assert evaluate(config(inputs, tmp_path)) is None
    assert every_file(tmp_path) == before
    assert f"mine: {CELLS} cells: {CELLS} done" in caplog.text


def test_more_presses_and_ratios_add_to_what_is_there(inputs, tmp_path, uninterrupted, caplog):
    evaluate(config(inputs, tmp_path, presses="knorm", ratios=0.6))
    before = every_file(tmp_path)
    with caplog.at_level("INFO", logger="sparsekv"):
        evaluate(config(inputs, tmp_path))
    assert f"{CELLS} cells: 2 done, {CELLS - 2} to do" in caplog.text
    assert results(tmp_path) == uninterrupted
    after = every_file(tmp_path)
    assert {path: after[path] for path in before if path.parent.name != "views"} == {
        path: content for path, content in before.items() if path.parent.name != "views"
    }


# ---- kills and stops ----


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_killed_and_resumed(inputs, tmp_path, uninterrupted, batches, caplog):
    with after_batches(batches, kill), pytest.raises(Killed):
        evaluate(config(inputs, tmp_path))
    done = journals(tmp_path)
    assert bool(done) == bool(batches)
    with caplog.at_level("INFO", logger="sparsekv"):
        assert evaluate(config(inputs, tmp_path)) is None
    if batches:
        assert f"partly ({done.total()} of {CELLS * CONTEXTS * QUESTIONS} rows)" in caplog.text
    assert results(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_batch(inputs, tmp_path, uninterrupted, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with after_batches(1, lambda: os.kill(os.getpid(), number)):
        assert evaluate(config(inputs, tmp_path)) == number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert len(journals(tmp_path)) >= 2  # the batch in flight is kept
    assert not list(tmp_path.glob("summary*"))
    assert evaluate(config(inputs, tmp_path)) is None
    assert results(tmp_path) == uninterrupted


def start(out: Path, inputs: Path, kill_after: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(out), str(inputs), str(kill_after)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_sigkill_twice(inputs, tmp_path, uninterrupted):
    """In the middle of a line of a journal; then the third process finishes."""
    for kills in (1, 2):
        process = start(tmp_path, inputs, 3)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL, output
        torn = [path for path in tmp_path.glob("*/journal-*") if not path.read_text().endswith("\n")]
        assert len(torn) == kills
    assert evaluate(config(inputs, tmp_path)) is None
    assert results(tmp_path) == uninterrupted


@pytest.mark.slow
def test_two_processes_never_do_a_row_twice(inputs, tmp_path, uninterrupted):
    """They begin together, each does a part, and both end when all is done."""
    log = tmp_path / "log"
    log.mkdir()
    processes = [start(tmp_path / "out", inputs, -1) for _ in range(2)]
    while len(list(log.glob("ready-*"))) < 2 and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    (log / "go").touch()
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert f"{CELLS} cells: {CELLS} done" in output  # each says so at its end
    lines = {path.name: path.read_text().splitlines() for path in log.glob("answers-*")}
    assert len(lines) == 2
    assert all(lines.values()), "one process did everything: the other did not share"
    counts = Counter(line for group in lines.values() for line in group)
    assert set(counts.values()) == {1}
    assert len(counts) == CELLS * CONTEXTS * QUESTIONS
    assert results(tmp_path / "out") == uninterrupted
    assert not list((tmp_path / "out").glob("*/journal-*"))


def program(out: Path, folder: Path, kill_after: int) -> int:
    """Evaluate; tear a line and kill this process after some batches, or log every answer."""
    from sparsekv.evaluation.matrix.cells import CellFolder

    plain, log = CellFolder.append, out.parent / "log"
    seen = []

    def tear(self, records):
        plain(self, records)
        seen.append(self)
        if len(seen) > kill_after * CELLS + 1:  # in the middle of a batch
            with self._journal._own.open("a") as file:
                file.write('{"row": 0, "gener')
            os.kill(os.getpid(), signal.SIGKILL)

    def note(self, records):
        records = list(records)
        plain(self, records)
        with (log / f"answers-{os.getpid()}").open("a") as file:
            file.writelines(f"{self.path.name} {record['row']} {record['generation']}\n" for record in records)
        time.sleep(0.02)  # the other gets a turn

    CellFolder.append = note if kill_after < 0 else tear
    if kill_after < 0:
        (log / f"ready-{os.getpid()}").touch()
        while not (log / "go").exists():
            time.sleep(0.01)
    return evaluate(config(folder, out)) or 0


# ---- shards ----


def test_shards_merged_are_the_whole(inputs, tmp_path, uninterrupted, caplog):
    with caplog.at_level("INFO", logger="sparsekv"):
        assert evaluate(config(inputs, tmp_path, shard="0/2")) is None
    assert results(tmp_path) == {}
    first = journals(tmp_path)
    evaluate(config(inputs, tmp_path, shard="0/2"))
    assert journals(tmp_path) == first, "a shard did what is not its own"
    assert evaluate(config(inputs, tmp_path, shard="1/2")) is None
    assert results(tmp_path) == uninterrupted


def test_shards_from_two_machines(inputs, tmp_path, uninterrupted):
    """Folders of two shards, copied into one: the same command does nothing but finish the cells."""
    for part in ("0", "1"):
        evaluate(config(inputs, tmp_path / part, shard=f"{part}/2"))
    for path in (tmp_path / "1").glob("*/journal-*"):
        path.rename(tmp_path / "0" / path.parent.name / path.name)
    with after_batches(0, lambda: pytest.fail("answered again")):
        evaluate(config(inputs, tmp_path / "0"))
    assert results(tmp_path / "0") == uninterrupted


@pytest.mark.parametrize(
    ("rank", "shard", "portions"),
    [("0", None, [*range(9)]), ("1", None, [*range(3, 9), 0, 1, 2]), ("2", "1/3", [7, 1, 4])],
)
def test_a_process_of_a_launcher_begins_at_its_place_and_leaves_nothing(
    inputs, tmp_path, uninterrupted, monkeypatch, rank, shard, portions
):
    """The others never come: what they would have done is done all the same, within the shard."""
    plain, seen = Job.works, []

    def works(job, portion):
        seen.append(portion)
        return plain(job, portion)

    monkeypatch.setattr(Job, "works", works)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert evaluate(config(inputs, tmp_path, shard=shard)) is None
    assert seen == portions
    assert results(tmp_path) == (uninterrupted if shard is None else {})


@pytest.mark.parametrize(("rank", "size"), [("5", "2"), ("2", "2"), ("x", "2"), ("0", "")])
def test_a_rank_that_cannot_be(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"^RANK={rank} WORLD_SIZE={size} "):
        EvalConfig(model="m", out="o")


def test_the_device_of_a_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert inputs_module.device(EvalConfig(model="m", out="o")) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert inputs_module.device(EvalConfig(model="m", out="o")) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert inputs_module.device(EvalConfig(model="m", out="o")) == "cuda:2"
    assert inputs_module.device(EvalConfig(model="m", out="o", device="cuda")) == "cuda:2"
    assert inputs_module.device(EvalConfig(model="m", out="o", device="cuda:1")) == "cuda:1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert inputs_module.device(EvalConfig(model="m", out="o")) == "cuda:0"


# ---- more than one model, benchmark, answer ----


def test_runs_and_benchmarks_of_a_file(inputs, tmp_path):
    adapter = attach_lora(load_model(str(inputs / "base")), 4, 8, ["q_proj", "v_proj"])
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    adapter.save_pretrained(tmp_path / "adapter")
    base = str(inputs / "base")
    runs = {"base": RunConfig(base), "trained": RunConfig(base, str(tmp_path / "adapter"))}
    benchmarks = [
        {"name": str(inputs / "mine.jsonl"), "tasks": "t0", "num_samples": 2},
        {"name": "perplexity", "context_length": 100, "num_samples": 2, "presses": "knorm", "ratios": "0.5"},
    ]
    options = {"benchmark": None, "presses": "snapkv:window_size=16", "ratios": "0.6"}
    out = tmp_path / "out"
    evaluate(config(inputs, out, runs=runs, benchmarks=benchmarks, **options))
    cells = {name: sorted(path.parent.name for path in (out / name).glob("*/profile.json")) for name in runs}
    assert len(cells["base"]) == 4
    assert cells["base"] == cells["trained"]
    base, trained = results(out / "base"), results(out / "trained")
    assert all(base[name] != trained[name] for name in base if name.endswith("csv"))
    (full,) = (out / "base").glob("perplexity*no_press*/predictions.csv")
    (evicted,) = (out / "base").glob("perplexity*knorm*/predictions.csv")
    kl = [[float(row["score:kl"]) for row in csv.DictReader(path.open(newline=""))] for path in (full, evicted)]
    assert max(kl[0]) == pytest.approx(0, abs=1e-6)
    assert min(kl[1]) > 1e-4
    summary = csv.DictReader((out / "summary.csv").open(newline=""))
    assert {(bool(row["adapter"]), bool(row["diff_base"])) for row in summary} == {(False, False), (True, True)}
    evaluate(config(inputs, out, runs=runs, benchmarks=benchmarks, only="base", **options))


def test_several_answers_to_a_question(inputs, tmp_path):
    sampling = {"temperature": 1.0, "num_generations": 3, "presses": "knorm", "ratios": "0.5"}
    with after_batches(2, kill), pytest.raises(Killed):
        evaluate(config(inputs, tmp_path / "a", **sampling))
    for name in ("a", "b"):
        evaluate(config(inputs, tmp_path / name, **sampling))
    assert results(tmp_path / "a") == results(tmp_path / "b")
    (path,) = (tmp_path / "b").glob("*knorm*/predictions.csv")
    answers = [row["predicted_answer"] for row in csv.DictReader(path.open(newline=""))]
    assert len(answers) == 3 * CONTEXTS * QUESTIONS
    assert len(set(answers)) > CONTEXTS * QUESTIONS


def test_a_press_that_cannot_run_does_not_end_the_matrix(inputs, tmp_path, caplog):
    """`finch` needs the question: without it the cell says why, and the others are done; then it is tried again."""
    with caplog.at_level("INFO", logger="sparsekv"):
        assert evaluate(config(inputs, tmp_path, presses="finch,knorm", ratios="0.5")) is None
    (folder,) = tmp_path.glob("*finch*")
    assert json.loads((folder / "unavailable.json").read_text())["reason"]
    assert "3 cells: 2 done, 1 cannot run here" in caplog.text
    assert "finch" in (tmp_path / "summary.csv").read_text()
    assert evaluate(config(inputs, tmp_path, presses="finch,knorm", ratios="0.5")) is None


def test_a_model_that_gives_no_numbers_says_so_and_ends_nothing(inputs, tmp_path, caplog):
    """A run that has diverged comes first; the sound one after it has its summary, and so has the folder of both."""
    lost = load_model(str(inputs / "base"), "float32", "cpu")
    lost.get_decoder().norm.weight.data.fill_(float("nan"))
    shutil.copytree(inputs / "base", tmp_path / "lost")
    lost.save_pretrained(tmp_path / "lost")
    models = {"lost": RunConfig(str(tmp_path / "lost")), "sound": RunConfig(str(inputs / "base"))}
    options = {"benchmark": "perplexity", "context_length": 64, "num_samples": 2, "presses": "knorm", "ratios": "0.5"}
    for _ in range(2):  # it may be asked again
        with caplog.at_level("INFO", logger="sparsekv"):
            assert evaluate(config(inputs, tmp_path / "out", runs=models, **options)) is None
        assert f"knorm 0.5: the output of model {tmp_path / 'lost'} is not finite: row 0 has nll nan" in caplog.text
    table = pd.read_csv(tmp_path / "out" / "summary.csv", keep_default_na=False)
    assert set(table.task[table.model.str.endswith("lost")]) == {"all tasks"}
    assert table.reason[table.model.str.endswith("lost")].str.contains("is not finite").all()
    assert (table.reason[table.model.str.endswith("base")] == "").all()
    assert not list((tmp_path / "out" / "lost").glob("*/predictions.csv"))
    assert (tmp_path / "out" / "lost" / "summary.md").exists()


def test_a_line_now_and_then_in_a_log(monkeypatch, caplog):
    monkeypatch.setattr("sparsekv.progress.EVERY", 0)
    with caplog.at_level("INFO", logger="sparsekv"), CountProgress("answers", 10) as progress:
        progress.advance(0)
        progress.advance(3)
        progress.advance(4)
    assert [message.partition(",")[0] for message in caplog.messages] == ["3 of 10 answers", "7 of 10 answers"]


# ---- prompts ----


@pytest.fixture
def encoder(tiny_tokenizer) -> Encoder:
    return make_encoder(tiny_tokenizer)


def make_encoder(
    tokenizer: PreTrainedTokenizerFast, kind: str = "generate", positions: int | None = None, twice=False, **options
):
    benchmark = Benchmark("mine", None, rows() * (1 + twice), lambda row: {}, lambda rows: {}, kind=kind)
    (suite,) = EvalConfig(model="m", out="o", benchmark="mine", **options).suites()
    return Encoder(tokenizer, positions, benchmark, suite)


def test_questions_of_a_context_stand_together(encoder):
    assert encoder.contexts() == [[2 * number, 2 * number + 1] for number in range(CONTEXTS)]
    work = encoder.encode([2, 3], [FULL_CACHE])
    assert [question.row for question in work.questions] == [2, 3]
    assert rows()[2]["context"] in encoder.tokenizer.decode(work.ids[0])
    assert "Question 1?" in encoder.tokenizer.decode(work.questions[1].ids[0])
    assert encoder.tokenizer.decode(work.questions[1].ids[0]).endswith("Answer:")


def test_the_press_sees_the_question(tiny_tokenizer):
    encoder = make_encoder(tiny_tokenizer, query_aware=True)
    assert encoder.contexts() == [[number] for number in range(CONTEXTS * QUESTIONS)]
    work = encoder.encode([3], [FULL_CACHE])
    assert tiny_tokenizer.decode(work.ids[0, -work.query_length :]) == "Question 1?"
    assert "Question" not in tiny_tokenizer.decode(work.questions[0].ids[0])


def test_rows_with_the_same_question_are_all_answered(tiny_tokenizer):
    encoder = make_encoder(tiny_tokenizer, query_aware=True, twice=True)
    assert encoder.contexts()[0] == [0, CONTEXTS * QUESTIONS]
    work = encoder.encode(encoder.contexts()[0], [FULL_CACHE])
    assert [question.row for question in work.questions] == [0, CONTEXTS * QUESTIONS]


def test_nothing_to_answer_or_to_score_is_refused(tiny_tokenizer, monkeypatch):
    encoder = make_encoder(tiny_tokenizer)
    tiny_tokenizer = encoder.tokenizer
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    encoder.benchmark.rows[1] |= {"question": "", "answer_prefix": ""}
    encoder.encode([0], [])
    with pytest.raises(UserError, match="row 1 has no token between context and answer"):
        encoder.encode([1], [])
    with pytest.raises(UserError, match="row 2 has an answer of 1 tokens"):
        make_encoder(tiny_tokenizer, kind="likelihood").encode([2], [])


def test_the_shortest_rows_are_looked_at_too():
    numbers = range(50)
    rows = [{"context": "c" * (50 - n), "question": "q", "answer_prefix": "p", "answer": "aa"} for n in numbers]
    rows[40]["question"], rows[45]["answer"] = "", "a"
    assert inputs_module._extremes(rows) == {*range(inputs_module.LONGEST), 40, 45}


def test_text_is_scored_as_it_is(tiny_tokenizer):
    encoder = make_encoder(tiny_tokenizer, kind="likelihood")
    encoder.benchmark.rows[0]["answer"] = "what follows"
    work = encoder.encode([0], [FULL_CACHE])
    assert tiny_tokenizer.decode(work.ids[0]) == "<|bos|>" + rows()[0]["context"]
    assert work.questions[0].ids.shape == (1, 0)
    assert tiny_tokenizer.decode(work.questions[0].answer_ids[0]) == "what follows"


def test_contexts_are_cut_or_refused(tiny_tokenizer):
    assert make_encoder(tiny_tokenizer, max_context_length=20).encode([0], []).ids.shape == (1, 20)
    fits = make_encoder(tiny_tokenizer, positions=2048).encode([0], [])
    length = fits.ids.shape[1] + fits.questions[0].ids.shape[1]
    make_encoder(tiny_tokenizer, positions=length).encode([0], [])
    with pytest.raises(UserError, match=rf"row 0 has {length} tokens, the model has {length - 1} positions"):
        make_encoder(tiny_tokenizer, positions=length - 1).encode([0], [])
    make_encoder(tiny_tokenizer, positions=length + 5, max_new_tokens=5).encode([0], [])
    with pytest.raises(UserError, match=rf"row 0 has {length + 5} tokens with --max_new_tokens 5"):
        make_encoder(tiny_tokenizer, positions=length + 4, max_new_tokens=5).encode([0], [])


def test_answers_are_as_long_as_asked(tiny_tokenizer):
    assert make_encoder(tiny_tokenizer).encode([0], []).questions[0].max_new_tokens == 6
    assert make_encoder(tiny_tokenizer, max_new_tokens=3).encode([0], []).questions[0].max_new_tokens == 3


# ---- work ----


def test_only_what_is_missing_is_worked_on(inputs, tmp_path):
    """Cells that lack the same questions of a context go together; a context that lacks none is left out."""
    (run,) = inputs_module.prepare(config(inputs, tmp_path, presses="knorm", ratios="0.3,0.6"))
    (job,) = run.jobs
    assert len(job.portions) == CONTEXTS
    cells = list(job.cells)
    job.cells[cells[0]].answered = {(row, 0) for row in range(CONTEXTS * QUESTIONS)}
    ((one, other),) = job.portions[1]
    job.cells[cells[1]].answered = {(one, 0)}
    assert job.missing(1) == 3
    assert {(tuple(q.row for q in work.questions), work.cells) for work in job.works(1)} == {
        ((other,), (Cell("knorm", 0.3),)),
        ((one, other), (Cell("knorm", 0.6),)),
    }
    job.cells[cells[1]].answered = job.cells[cells[2]].answered = job.cells[cells[0]].answered
    assert job.works(1) == []


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"presses": "snapvk"}, "snapkv"),
        ({"presses": "snapkv:window=3"}, "window_size"),
        ({"benchmark": "rulr"}, "ruler"),
        ({"benchmark": "no.jsonl"}, "no.jsonl"),
        ({"context_length": 4096, "benchmark": "ruler-local"}, "--context_length 4096"),
        ({"model": "/no/such/model"}, "--model /no/such/model"),
        ({"adapter": "/no/such/adapter"}, "--adapter /no/such/adapter"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"out": "/proc/nowhere"}, "--out /proc/nowhere"),
        ({"out": "z" * 300}, "--out zzz.*too long"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"max_new_tokens": 3000}, "with --max_new_tokens 3000, the model has 2048 positions"),
        ({"presses": "decoding_knorm", "benchmark": "perplexity", "context_length": 100}, "--presses decoding_knorm"),
        *(
            ({flag: value, "benchmark": "perplexity", "context_length": 100, "num_samples": 2, **more}, f"--{flag} ")
            for flag, value, more in (
                ("max_context_length", 50, {}),
                ("max_new_tokens", 5, {}),
                ("query_aware", True, {}),
                ("temperature", 0.5, {}),
            )
        ),
    ],
)
def test_nothing_is_written_for_what_cannot_work(inputs, tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as refused:
        evaluate(config(inputs, **{"out": tmp_path / "out", **changes}))
    assert "\n" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_a_likelihood_of_scaled_logits_writes_nothing(inputs, tmp_path):
    model = shutil.copytree(inputs / "base", tmp_path / "base")
    settings = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(settings | {"logits_scaling": 8.0}), "utf-8")
    asked = {"model": str(model), "benchmark": "perplexity", "context_length": 100, "num_samples": 2}
    with pytest.raises(UserError, match=f"^--model {model}: its logits are changed by logits_scaling"):
        evaluate(config(inputs, **{"out": tmp_path / "out", **asked}))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base(inputs, tmp_path):
    other = save_tiny(tmp_path / "other", hidden_size=32)
    attach_lora(load_model(other), 4, 8, ["q_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--adapter .*: does not fit"):
        evaluate(config(inputs, tmp_path / "out", adapter=str(tmp_path / "adapter")))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_adds_tokens(inputs, tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(load_model(str(inputs / "base")), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match=r"--adapter .*prompt: adds tokens"):
        evaluate(config(inputs, tmp_path / "out", adapter=str(tmp_path / "prompt")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["context", "question", "answer_prefix"])
def test_a_token_that_the_model_does_not_know(inputs, tmp_path, where):
    """It is in one row, and neither of the longest nor of the shortest."""
    model = tmp_path / "base"
    shutil.copytree(inputs / "base", model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(model)
    row, file = rows()[0], tmp_path / "mine.jsonl"
    mine = [{**row, "context": row["context"][:size], "question": f"What is {size}?"} for size in range(200, 230)]

    def prepare() -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in mine))
        inputs_module.prepare(config(inputs, tmp_path / "out", model=str(model), benchmark=str(file)))

    prepare()  # a token that does not occur does no harm
    mine[3][where] += "<|new|>"
    with pytest.raises(UserError, match=f"--model {model}: its tokenizer makes token 320, and the model knows 320"):
        prepare()


def test_a_model_that_cannot_be_loaded_leaves_nothing(inputs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(inputs / "base", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=f"--model {broken}"):
        evaluate(config(inputs, tmp_path / "out", model=str(broken)))
    assert not (tmp_path / "out").exists()


def test_prefill_presses_where_the_cache_grows(inputs, tmp_path, monkeypatch):
    growing = Benchmark("aime25", None, rows(), lambda row: {"correct": 1.0}, lambda rows: {}, grows=True)
    monkeypatch.setattr(inputs_module, "load_benchmark", lambda *args, **options: growing)
    window = "snapkv:window_size=9"
    for press, said in ((window, f"give decoding_{window}"), ("kvzip", "of .*decoding_snapkv, ")):
        with pytest.raises(UserError, match=f"--presses {press}: .*aime25.*{said}"):
            inputs_module.prepare(config(inputs, tmp_path, presses=f"decoding_knorm,{press}"))
    assert inputs_module.prepare(config(inputs, tmp_path, presses="decoding_knorm"))


def test_another_configuration_and_a_corrupt_cell_leave_the_rest_alone(inputs, tmp_path):
    evaluate(config(inputs, tmp_path, presses="knorm", ratios="0.3"))
    before = every_file(tmp_path)
    with pytest.raises(UserError, match="seed 0, now 1"):
        evaluate(config(inputs, tmp_path, seed=1))
    assert every_file(tmp_path) == before
    (folder,) = tmp_path.glob("*knorm*")
    (folder / "config.yaml").unlink()
    before = every_file(tmp_path)
    with pytest.raises(UserError, match=r"corrupt \(no config\.yaml\)"):
        evaluate(config(inputs, tmp_path))
    assert every_file(tmp_path) == before


def test_a_row_without_the_question_that_a_press_needs(inputs, tmp_path):
    lines = [{**row, "question": ""} if number == 3 else row for number, row in enumerate(rows())]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    options = {"benchmark": str(tmp_path / "some.jsonl"), "query_aware": True}
    inputs_module.prepare(config(inputs, tmp_path / "out", presses="knorm", **options))
    with pytest.raises(UserError, match="--presses finch: needs a question, and row "):
        inputs_module.prepare(config(inputs, tmp_path / "out", presses="finch", **options))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("predictions.csv", "row,generation\n0,0\n"),
        ("predictions.csv", "row,generation,task,score:m\n0,0,t,\n"),
        ("predictions.csv", "row,generation,task,score:m\n0,0,t,oops\n"),
        ("profile.json", "[]"),
    ],
)
@pytest.mark.parametrize("whose", ["own", "another's"])
def test_what_the_summary_could_not_read_is_refused_at_the_start(inputs, tmp_path, file, content, whose):
    (tmp_path / "one.jsonl").write_text(json.dumps(rows()[0]) + "\n")
    options = {"benchmark": str(tmp_path / "one.jsonl"), "ratios": "0.5"}
    out = tmp_path / "out"
    evaluate(config(inputs, out, presses="knorm", **options))
    (folder,) = out.glob("*knorm*")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=f"{folder / file}: corrupt"):
        inputs_module.prepare(config(inputs, out, presses="knorm" if whose == "own" else "random", **options))


def test_other_versions_of_what_decides_answers_are_noticed(inputs, tmp_path, monkeypatch):
    options = {"presses": "knorm", "ratios": "0.5"}
    (run,) = inputs_module.prepare(config(inputs, tmp_path, **options))
    (tmp_path / ".locks").mkdir()
    next(iter(run.jobs[0].cells.values())).begin()
    inputs_module.prepare(config(inputs, tmp_path, **options))
    monkeypatch.setattr(inputs_module, "versions", lambda names: dict.fromkeys(names, "9.9"))
    with pytest.raises(UserError, match=r"kvpress_version '.*', now '9.9'"):
        inputs_module.prepare(config(inputs, tmp_path, **options))


def test_a_changed_benchmark_or_model_is_noticed(inputs, tmp_path):
    out, file = tmp_path / "out", tmp_path / "mine.jsonl"
    file.write_text((inputs / "mine.jsonl").read_text())
    model = save_tiny(tmp_path / "base")
    options = {"presses": "knorm", "ratios": "0.3", "model": model, "benchmark": str(file)}
    evaluate(config(inputs, out, **options))
    file.write_text(file.read_text().replace("Question 1", "Question 2"))
    with pytest.raises(UserError, match="benchmark_fingerprint"):
        evaluate(config(inputs, out, **options))
    file.write_text((inputs / "mine.jsonl").read_text())
    changed = load_model(model)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    changed.save_pretrained(model)
    with pytest.raises(UserError, match="model_fingerprint"):
        evaluate(config(inputs, out, **options))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sparsekv").setLevel(logging.INFO)
    torch.set_num_threads(1)
    sys.exit(program(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
