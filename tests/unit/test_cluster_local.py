"""The chain on this machine: a queue over GPUs, with a small program in place of sparsekv; once the real one."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from fake_slurm import make_experiment
from tiny import run_options

from sparsekv.cluster import local, submit
from sparsekv.cluster.artefacts import State
from sparsekv.cluster.book import Book
from sparsekv.cluster.config import StatusConfig, SubmitConfig
from sparsekv.cluster.status import cancel

# Says when it began and ended and on which GPUs; a file says how it should end.
PROGRAM = """
import json, os, signal, sys, time
def end(*_):
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
arguments = sys.argv[1:]
name = arguments[0] + ("-control" if "--control" in arguments else "-base" if "base" in arguments else "")
gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
begin = time.time()
open("started-" + name, "w").close()
time.sleep(60 if os.path.exists("hangs-" + name) else 0.3)
print("the last word of", name)
with open("log.jsonl", "a") as file:
    file.write(json.dumps([name, gpus, begin, time.time()]) + "\\n")
sys.exit(3 if os.path.exists("fails-" + name) else 0)
"""


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_experiment(tmp_path, resources={"analyze": {"gpus": 2}})
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(local, "PROGRAM", (sys.executable, "-S", "program.py"))
    monkeypatch.setattr(local, "POLL", 0.02)
    monkeypatch.setattr(local, "state", lambda phase: State(True, "as it should be"))
    monkeypatch.setattr(local, "_gpus", lambda: ["4", "7"])
    return tmp_path


def run() -> int:
    return submit.submit(SubmitConfig("pipeline", "tiny", executor="local", yes=True))


def log() -> dict[str, list[tuple[str, float, float]]]:
    """Name → (GPUs, begin, end) of each process."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for line in Path("log.jsonl").read_text().splitlines():
        name, *rest = json.loads(line)
        found.setdefault(name, []).append(tuple(rest))
    return found


def test_one_process_a_gpu_in_the_order_of_the_chain(site):
    assert run() == 0
    done = log()
    counts = {name: len(processes) for name, processes in done.items()}
    assert counts == {"analyze": 1, "eval-base": 2, "train-control": 1, "train": 1, "eval": 2}
    assert done["analyze"][0][0] == "4,7", "an analysis spreads over as many as it asks for"
    assert {gpus for gpus, *_ in done["eval"]} == {"4", "7"}
    assert {done["train"][0][0], done["train-control"][0][0]} == {"4", "7"}
    order = [["analyze"], ["eval-base"], ["train-control", "train"], ["eval"]]
    for before, behind in itertools.pairwise(order):
        ended = max(end for name in before for *_, end in done[name])
        assert ended <= min(begin for name in behind for _, begin, _ in done[name])
    entries = Book(site / "results/tiny").entries()
    assert len(entries) == 7
    assert all(entry.status == 0 and Path(entry.log).is_file() for entry in entries)


def test_a_failure_stops_what_needs_it(site, capsys):
    (site / "fails-train-control").touch()
    assert run() == 1
    assert "train" in log(), "which does not need the control"
    assert "eval" not in log()
    said = capsys.readouterr().err
    assert "phase 2 control: failed with status 3" in said
    assert "the last word of train-control" in said
    assert "phase 3 trained: not run: control failed" in said


def test_ending_well_is_not_enough(site, monkeypatch, capsys):
    monkeypatch.setattr(local, "state", lambda phase: State(False, "nothing yet"))
    assert run() == 1
    assert "ended well and left its work undone (nothing yet)" in capsys.readouterr().err
    assert list(log()) == ["analyze"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_its_own_children_only(site, number):
    (site / "hangs-train").touch()
    (site / "hangs-train-control").touch()
    stranger = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    stop = as_soon_as("started-train", "started-train-control", do=lambda: os.kill(os.getpid(), number))
    assert run() == 128 + number
    stop.join()
    entries = [entry for entry in Book(site / "results/tiny").entries() if entry.phase in ("control", "train")]
    assert [entry.status for entry in entries] == [143, 143], "they had time to save"
    assert not any(entry.running for entry in entries)
    assert stranger.poll() is None
    stranger.kill()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def as_soon_as(*files: str, do: Callable[[], object]) -> threading.Thread:
    """Do something in a thread when the files are there."""

    def wait():
        while not all(map(os.path.exists, files)):
            time.sleep(0.02)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_cancel_ends_the_chain(site, monkeypatch, capsys):
    """And not only the process that runs: what waits for its GPU is not started."""
    monkeypatch.setattr(local, "_gpus", lambda: ["4"])
    (site / "hangs-train-control").touch()
    stop = as_soon_as("started-train-control", do=lambda: cancel(StatusConfig("tiny")))
    assert run() == 128 + signal.SIGTERM
    stop.join()
    assert "stopped; the same command continues" in capsys.readouterr().err
    assert not (site / "started-train").exists()


def test_what_runs_is_not_started_twice(site, monkeypatch):
    assert run() == 0
    book = Book(site / "results/tiny")
    entry = [each for each in book.entries() if each.phase == "analyze"][-1]
    me = psutil.Process()
    book.add(type(entry)(**{**vars(entry), "number": str(me.pid), "born": me.create_time(), "status": None}))
    queued, _ = submit._queued(["analyze", "baseline"], book)
    assert list(queued) == ["analyze"]


@pytest.mark.slow
def test_the_whole_chain_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    """Really: analysis, baseline, training, evaluation; then all of it is done, and a second call says so."""
    monkeypatch.chdir(tmp_path)
    options = run_options(tmp_path)
    analysis = {"data": options["data"], "num_samples": 2, "max_len": 48, "device": "cpu"}
    make_experiment(tmp_path, options["model"], analyze=analysis, control=None)
    runs = {"base": {"model": options["model"]}}
    runs |= {name: {"model": options["model"], "adapter": f"out/{name}/final"} for name in ("control", "trained")}
    benchmark = {"name": "perplexity", "data_dir": options["data"], "context_length": 64, "num_samples": 2}
    matrix = {"runs": runs, "presses": ["knorm"], "ratios": [0.5], "benchmarks": [benchmark], "device": "cpu"}
    for name, content in (("train", options), ("matrix", matrix)):
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(local, "_gpus", list)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    began = time.time()
    assert run() == 0, capsys.readouterr().err
    assert Path("out/trained/final/adapter_model.safetensors").stat().st_mtime > began
    capsys.readouterr()
    assert run() == 0
    said = capsys.readouterr().out
    assert "nothing to submit" in said
    assert said.count(": done") == 4
