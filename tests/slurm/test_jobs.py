"""The jobs of scripts/, submitted by hand to a real Slurm. The chain of all of them is in test_submit.py."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from cluster import Project, wait_until
from tiny import as_flags, run_options

ROWS = 16
CELLS = ("no_press", "knorm", "streaming_llm")
EVAL, NODES = "slurm_phase1_baseline.sh", "slurm_phase2_train_multinode.sh"
FIRST = ("--nodelist=n1",)
ONE = {"SPARSEKV_PROCESSES": "1"}  # does not wait for PyTorch to count GPUs


NOTES_ANSWERS = """\
#!{python}
import os, sys, time
from pathlib import Path
from sparsekv.cli import main
from sparsekv.evaluation.matrix.cells import CellFolder

folder, task = Path("answers"), os.environ["SLURM_ARRAY_TASK_ID"]
folder.mkdir(exist_ok=True)
plain = CellFolder.append

def note(self, records):
    records = list(records)
    (folder / f"begun-{{task}}").touch()
    while len(list(folder.glob("begun-*"))) < 2 and time.monotonic() < until:  # loading takes one longer than the other
        time.sleep(0.05)
    plain(self, records)
    with (folder / task).open("a") as file:
        file.writelines(f"{{self.path.name}} {{record['row']}} {{record['generation']}}\\n" for record in records)
    time.sleep(0.05)  # the other gets a turn

CellFolder.append = note
until = time.monotonic() + 120  # if they do not share, that is seen by what they note
main(sys.argv[1:])
"""


ENDS_WHEN_RESTARTED = """\
#!/bin/sh
if [ -n "$SLURM_RESTART_COUNT" ]; then echo second time; exit 0; fi
touch "{folder}/started-$SLURM_ARRAY_TASK_ID"
exec sleep 300
"""


@pytest.fixture(scope="module")
def project(slurm_cluster, tmp_path_factory) -> Project:
    """A user's folder, with a tiny model, text and questions."""
    project = Project(slurm_cluster, tmp_path_factory.mktemp("jobs") / "project")
    rows = [
        {
            "context": f"The depot in town {number} opens at {number} past nine. " * 3,
            "question": "When does it open?",
            "answer_prefix": "At",
            "answer": [str(number)],
            "max_new_tokens": 3,
            "task": "qa_depot",
        }
        for number in range(ROWS)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (project.folder / "questions.jsonl").write_text(lines, "utf-8")
    return project


@pytest.fixture(scope="module")
def options(project) -> dict:
    """Of a training."""
    return run_options(project.folder) | {"save_steps": 100_000, "eval_steps": 0, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def limited(project) -> str:
    """A job that reaches its time limit while other tests run: Slurm looks every half a minute, after 29 to 59 s."""
    path = stand_in(project.folder / "limited")
    limit = ("--time=00:01:00", "--signal=B:USR1@1", "--array=0-0")
    return project.sbatch(EVAL, options=(*FIRST, *limit), PATH=f"{path}:{project.cluster.environment['PATH']}", **ONE)


def stand_in(folder: Path) -> Path:
    """A folder with a program in place of sparsekv, which ends when its job is there for the second time."""
    folder.mkdir()
    program = folder / "sparsekv"
    program.write_text(ENDS_WHEN_RESTARTED.format(folder=folder), "utf-8")
    program.chmod(0o755)
    return folder


def steps(out: Path) -> int:
    """How many steps a training has logged."""
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text("utf-8").splitlines()) if metrics.exists() else 0


def last_checkpoint(out: Path) -> int:
    return max((int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")), default=0)


def test_an_array_shares_a_matrix(project, options, limited):
    """Two of three tasks at a time: both do a part, nothing is done twice, and the third finds nothing to do."""
    cluster, folder = project.cluster, project.folder
    notes = folder / "bin" / "sparsekv"
    notes.parent.mkdir()
    notes.write_text(NOTES_ANSWERS.format(python=sys.executable), "utf-8")
    notes.chmod(0o755)
    cells = ["--presses", ",".join(CELLS[1:]), "--ratios", "0.5", "--device", "cpu", "--view_tokens", "0"]
    evaluation = ["--model", options["model"], "--benchmark", "questions.jsonl", *cells, "--out", "results/base"]
    path = f"{notes.parent}:{cluster.environment['PATH']}"
    array = project.sbatch(EVAL, *evaluation, options=(*FIRST, "--array=0-2%2"), PATH=path)
    tasks = [f"{array}_{task}" for task in range(3)]
    assert cluster.wait(*tasks) == ["COMPLETED"] * 3, project.log(array)
    done = [(folder / "answers" / str(task)).read_text().splitlines() for task in (0, 1)]
    assert all(done), "one task did everything: the other did not share"
    counts = Counter(done[0] + done[1])
    assert set(counts.values()) == {1}
    assert len(counts) == len(CELLS) * ROWS
    assert not (folder / "answers" / "2").exists()
    assert cluster.show(tasks[2])["StartTime"] >= min(cluster.show(task)["EndTime"] for task in tasks[:2])
    found = list((folder / "results/base").glob("*/predictions.csv"))
    assert len(found) == len(CELLS)
    assert all(len(pd.read_csv(path)) == ROWS for path in found)


def test_one_training_on_two_nodes(project, options):
    """A process a node: asked for the nodes both save, and the job queues again; cancelled, they save once more."""
    cluster, out = project.cluster, project.folder / "nodes"
    real = ["--dtype", "float32", "--gradient_checkpointing", "false", "--data_subset", "null"]
    arguments = ["configs/qwen3_8b.yaml", *as_flags(options), *real, "--max_steps", "100000", "--output_dir", "nodes"]
    job = project.sbatch(NODES, *arguments, **ONE)
    wait_until(lambda: steps(out) > 3, "some steps")
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_until(lambda: cluster.show(job)["Restarts"] == "1", "the requeue")
    limited = last_checkpoint(out)
    assert limited > 3
    cluster.start_again(job)
    wait_until(lambda: steps(out) > limited + 3, "more steps")
    cluster.call("scancel", job)  # its TERM reaches them twice: srun passes it on
    cluster.wait_for_processes(job)
    assert last_checkpoint(out) > limited
    log = project.log(job)
    assert "node 1 of 2: processes 0 to 0" in log
    assert "node 2 of 2: processes 1 to 1" in log
    assert log.count("continues from the checkpoint just written") == 4
    assert "FAILED" not in log


def test_no_environment(project):
    path = "/usr/bin:/bin"
    assert shutil.which("sparsekv", path=path) is None
    job = project.sbatch(EVAL, options=FIRST, PATH=path)
    assert project.cluster.wait(job) == ["FAILED"]
    (line,) = project.log(job).strip().splitlines()
    assert "FAILED: no environment with sparsekv" in line


def test_a_job_that_is_asked_for_its_node_queues_again(project):
    """The last task of an array, whose id is also that of the array: the other task goes on."""
    cluster, folder = project.cluster, stand_in(project.folder / "asked")
    path = f"{folder}:{cluster.environment['PATH']}"
    array = project.sbatch(EVAL, options=(*FIRST, "--array=0-1"), PATH=path, **ONE)
    other, last = f"{array}_0", f"{array}_1"
    wait_until(lambda: len(list(folder.glob("started-*"))) == 2, "both tasks")
    assert cluster.show(last)["JobId"] == array
    cluster.call("scancel", "--batch", "--signal=USR1", last)
    cluster.start_again(last)
    assert cluster.wait(last) == ["COMPLETED"]
    assert (cluster.show(other)["JobState"], cluster.show(other)["Restarts"]) == ("RUNNING", "0")
    cluster.call("scancel", other)
    assert cluster.wait(other) == ["CANCELLED"]
    log = project.log(array)
    assert log.count("this job queues again") == 1
    assert log.endswith("second time\n")  # the log of the first time is still there


def test_a_job_at_its_time_limit_queues_again(project, limited):
    project.cluster.start_again(limited)
    assert project.cluster.wait(limited) == ["COMPLETED"]
    log = project.log(limited)
    assert log.count("this job queues again") == 1
    assert log.endswith("second time\n")
    assert "TIME LIMIT" not in log
