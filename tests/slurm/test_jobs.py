"""The jobs of scripts/ on a real Slurm: the product itself on a tiny model."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from cluster import Project, wait_until
from tiny import as_flags, run_options

STEPS = 120  # of a training; some seconds, so that it can be interrupted on the way
ROWS = 16
CELLS = ("no_press", "knorm", "streaming_llm")
ANALYZE, EVAL = "slurm_phase0_analyze.sh", "slurm_phase1_baseline.sh"
QWEN, TRAINED = "slurm_phase2_train_qwen.sh", "slurm_phase3_eval_trained.sh"
FIRST, SECOND = ("--nodelist=n1",), ("--nodelist=n2",)  # on the second node jobs are preempted
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
    plain(self, records)
    with (folder / task).open("a") as file:
        file.writelines(f"{{self.path.name}} {{record['row']}} {{record['generation']}}\\n" for record in records)
    time.sleep(0.05)  # the other gets a turn

CellFolder.append = note
(folder / f"ready-{{task}}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.05)
main(sys.argv[1:])
"""


ENDS_WHEN_RESTARTED = """\
#!/bin/sh
if [ -n "$SLURM_RESTART_COUNT" ]; then echo second time; exit 0; fi
touch "asked/started-$SLURM_ARRAY_TASK_ID"
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
    changes = {"max_steps": STEPS, "save_steps": 10 * STEPS, "eval_steps": 0, "lora_dropout": 0.1}
    return run_options(project.folder) | changes


@pytest.fixture(scope="module")
def training(options) -> list[str]:
    """The same as arguments of the job, without the folder; the job's own configuration is for a real model."""
    real = ["--dtype", "float32", "--gradient_checkpointing", "false", "--data_subset", "null"]
    return [*as_flags(options), *real]


@pytest.fixture(scope="module")
def evaluation(options) -> list[str]:
    cells = ["--presses", ",".join(CELLS[1:]), "--ratios", "0.5", "--device", "cpu", "--view_tokens", "0"]
    return ["--model", options["model"], "--benchmark", "questions.jsonl", *cells]


@pytest.fixture(scope="module")
def chain(project, options, training, evaluation) -> dict[str, str]:
    """Jobs of a chain, by what they do; the baseline is an array in which every answer is noted."""
    notes = project.folder / "bin" / "sparsekv"
    notes.parent.mkdir()
    notes.write_text(NOTES_ANSWERS.format(python=sys.executable), "utf-8")
    notes.chmod(0o755)
    noted = {"PATH": f"{notes.parent}:{project.cluster.environment['PATH']}"}
    analysis = ["--num_samples", "2", "--max_len", "64", "--anchors.recent_size", "8"]
    links = {
        "analyze": (ANALYZE, ["--model", options["model"], *analysis, "--output_dir", "results/analysis"], (), ONE),
        "baseline": (EVAL, [*evaluation, "--out", "results/base"], ("--array=0-2%2",), noted),
        "train": (QWEN, [*training, "--output_dir", "out"], (), ONE),
        "trained": (TRAINED, [*evaluation, "--adapter", "out/final", "--out", "results/trained"], (), ONE),
    }
    jobs: dict[str, str] = {}
    for name, (script, arguments, more, environment) in links.items():
        after = (f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes") if jobs else ()
        jobs[name] = project.sbatch(script, *arguments, options=(*FIRST, *after, *more), **environment)
    return jobs


@pytest.fixture(scope="module")
def failing(project, training, evaluation) -> tuple[str, str]:
    """A training that cannot be, and what waits for it."""
    bad = project.sbatch(QWEN, *training, "--output_dir", "bad", "--lr", "-1", options=FIRST, **ONE)
    after = (*FIRST, f"--dependency=afterok:{bad}", "--kill-on-invalid-dep=yes")
    arguments = [*evaluation, "--adapter", "bad/final", "--out", "results/never"]
    return bad, project.sbatch(TRAINED, *arguments, options=after, **ONE)


def steps(out: Path) -> int:
    """How many steps a training has logged."""
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text("utf-8").splitlines()) if metrics.exists() else 0


def last_checkpoint(out: Path) -> int:
    return max((int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")), default=0)


def test_an_interrupted_training_is_the_one_that_never_was(project, chain, failing, training):
    """Preempted, then cancelled: each time it has saved, and goes on from there."""
    cluster, out = project.cluster, project.folder / "interrupted"
    arguments = [*training, "--output_dir", "interrupted"]
    important = ("--partition=high", "--nodelist=n2", "--gres=gpu:4", "--output=/dev/null", "--wrap=true")
    job = project.sbatch(QWEN, *arguments, options=SECOND, **ONE)
    wait_until(lambda: steps(out) > 5, "some steps")
    cluster.call("sbatch", *important)
    cluster.start_again(job)
    preempted = last_checkpoint(out)
    wait_until(lambda: steps(out) > preempted + 5, "more steps")
    cluster.call("scancel", job)
    cluster.wait_for_processes(job)
    assert cluster.show(job)["JobState"] == "CANCELLED"
    assert 0 < preempted < last_checkpoint(out) < STEPS
    assert not (out / "final").exists()
    again = project.sbatch(QWEN, *arguments, options=SECOND, **ONE)
    assert cluster.wait(again, chain["train"]) == ["COMPLETED"] * 2
    wanted, found = (folder / "final/adapter_model.safetensors" for folder in (project.folder / "out", out))
    assert wanted.read_bytes() == found.read_bytes()
    assert [path.name for path in (project.folder / "out").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def test_a_chain_leaves_its_artefacts(project, chain):
    assert project.cluster.wait(*chain.values()) == ["COMPLETED"] * 4, [project.log(job) for job in chain.values()]
    folder = project.folder
    assert (folder / "results/analysis/attention_analysis.json").is_file()
    assert (folder / "out/final/adapter_model.safetensors").is_file()
    for out in ("base", "trained"):
        cells = list((folder / "results" / out).glob("*/predictions.csv"))
        assert len(cells) == len(CELLS)
        assert all(len(pd.read_csv(path)) == ROWS for path in cells)
        assert (folder / "results" / out / "summary.md").is_file()
    assert "FAILED" not in "".join(path.read_text("utf-8") for path in folder.glob("logs/[!t]*.log"))


def test_a_training_that_fails_takes_its_dependents_with_it(project, failing):
    bad, never = failing
    assert project.cluster.wait(bad, never) == ["FAILED", "CANCELLED"]
    assert project.log(bad).count("FAILED: sparsekv train ended with status 2") == 1
    assert "--lr" in project.log(bad)
    assert not (project.folder / "results/never").exists()


def test_an_array_shares_a_matrix(project, chain):
    """Two of three tasks at a time: both do a part, nothing is done twice, and the third finds nothing to do."""
    cluster, folder = project.cluster, project.folder
    tasks = [f"{chain['baseline']}_{task}" for task in range(3)]
    assert cluster.wait(*tasks) == ["COMPLETED"] * 3
    done = [(folder / "answers" / str(task)).read_text().splitlines() for task in (0, 1)]
    assert all(done), "one task did everything: the other did not share"
    counts = Counter(done[0] + done[1])
    assert set(counts.values()) == {1}
    assert len(counts) == len(CELLS) * ROWS
    assert not (folder / "answers" / "2").exists()
    assert cluster.show(tasks[2])["StartTime"] >= min(cluster.show(task)["EndTime"] for task in tasks[:2])


def test_one_training_on_two_nodes(project, training):
    """A process a node: at the time limit both save, and the job queues again; cancelled, they save once more."""
    cluster, out = project.cluster, project.folder / "nodes"
    arguments = ["configs/qwen3_8b.yaml", *training, "--max_steps", "100000", "--output_dir", "nodes"]
    limit = ("--time=00:01:00", "--signal=B:USR1@1")  # Slurm looks every half a minute: after 29 to 59 s
    job = project.sbatch("slurm_phase2_train_multinode.sh", *arguments, options=limit, **ONE)
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
    cluster, folder = project.cluster, project.folder / "asked"
    folder.mkdir()
    program = folder / "sparsekv"
    program.write_text(ENDS_WHEN_RESTARTED, "utf-8")
    program.chmod(0o755)
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
