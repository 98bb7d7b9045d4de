"""`sparsekv submit` on a real Slurm, as docs/cluster.md has it: the experiment of the repository with a tiny model."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from cluster import ROOT, Cluster, Project, wait_until
from tiny import run_options

from sparsekv.cli import main

STEPS = 120  # of a training; some seconds, so that it can be interrupted on the way
ROWS = 6
PHASES = ("analyze", "baseline", "control", "train", "trained")
IMPORTANT = ("--partition=high", "--nodelist=n2", "--gres=gpu:4", "--output=/dev/null", "--wrap=true")
ON_SECOND = {"SPARSEKV_SBATCH": "--nodelist=n2"}  # where jobs are preempted


def four_commands() -> list[str]:
    """Those of the document."""
    text = (ROOT / "docs/cluster.md").read_text("utf-8")
    section = text[text.index("## Four commands") :].partition("\n## The site")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    assert len(commands) == 4
    return commands


class Account(Project):
    """A user who has just cloned the repository; the files that its commands name hold a tiny experiment."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(cluster, folder)
        shutil.copytree(ROOT / "sparsekv", folder / "sparsekv", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        # The packages of this environment are there already for the one that the first command makes.
        packages = {"PYTHONPATH": sysconfig.get_path("purelib"), "SPARSEKV_PROCESSES": "1"}
        self.environment = {**cluster.environment, **packages}
        self._write_configurations()

    def _write_configurations(self) -> None:
        configs = self.folder / "configs"
        options = run_options(self.folder) | {"max_steps": STEPS, "save_steps": 10 * STEPS, "eval_steps": 0}
        options |= {"lora_dropout": 0.1, "dtype": "float32", "gradient_checkpointing": False}
        write_yaml(configs / "qwen3_8b.yaml", options)
        questions = [{"context": f"Town {n} opens at {n}. " * 4, "question": "When?"} for n in range(ROWS)]
        answers = {"answer_prefix": "At", "answer": ["9"], "max_new_tokens": 3, "task": "qa"}
        lines = "".join(json.dumps(question | answers) + "\n" for question in questions)
        (self.folder / "questions.jsonl").write_text(lines, "utf-8")
        matrix = read_yaml(configs / "matrix.yaml") | {"presses": ["knorm"], "ratios": [0.5], "dtype": "float32"}
        matrix |= {"benchmarks": [{"name": "questions.jsonl"}], "device": "cpu", "view_tokens": 0}
        mine = {name: run for name, run in matrix["runs"].items() if name.startswith("qwen3")}
        matrix["runs"] = {name: run | {"model": options["model"]} for name, run in mine.items()}
        write_yaml(configs / "matrix.yaml", matrix)
        pipeline = read_yaml(configs / "pipeline.yaml")
        pipeline["models"] = {"qwen3": pipeline["models"]["qwen3"] | {"model": options["model"], "billions": 1e-4}}
        pipeline["analyze"] = {"num_samples": 2, "max_len": 64, "anchors.recent_size": 8}
        write_yaml(configs / "pipeline.yaml", pipeline)

    def type(self, *lines: str, answer: str = "") -> str:
        """What a shell says to these lines, typed at a terminal."""
        terminal, end = pty.openpty()
        os.write(terminal, answer.encode())
        pipes = {"stdin": end, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        shell = ["bash", "-euc", "\n".join(lines)]
        done = subprocess.run(shell, cwd=self.folder, env=self.environment, timeout=300, **pipes)
        os.close(terminal)
        os.close(end)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def sparsekv(self, *words: str, **environment: str) -> str:
        """What a command says: in this process, which has imported already what takes a new one seconds."""
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name, value in {**self.environment, **environment}.items():
                patch.setenv(name, value)
            with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
                main(words)
        assert not ended.value.code, said.getvalue()
        return said.getvalue()

    def submit(self, **environment: str) -> str:
        return self.sparsekv("submit", "pipeline", "--model", "qwen3", "--yes", **environment)

    def status(self) -> dict[str, str]:
        """Phase → its lines."""
        said = self.sparsekv("status", "--model", "qwen3")
        parts = re.split(r"(?m)^  phase \d (\w+): ", said)[1:]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    def jobs(self) -> dict[str, str]:
        """Phase → its newest job."""
        entries = json.loads((self.folder / "results/qwen3/jobs.json").read_text("utf-8"))
        return {entry["phase"]: entry["number"] for entry in entries}

    def forget_training(self) -> None:
        """As if phase 2 and phase 3 of the trained model had never been."""
        shutil.rmtree(self.folder / "out/qwen3-8b")
        shutil.rmtree(self.folder / "results/qwen3/matrix/qwen3-8b-trained")

    @property
    def adapter(self) -> Path:
        return self.folder / "out/qwen3-8b/final/adapter_model.safetensors"

    @property
    def steps(self) -> int:
        """How many steps the training has logged."""
        metrics = self.folder / "out/qwen3-8b/metrics.jsonl"
        return metrics.read_text("utf-8").count('"loss"') if metrics.exists() else 0

    @property
    def saved(self) -> int:
        """The step of the last checkpoint."""
        folders = (self.folder / "out/qwen3-8b").glob("checkpoint-*")
        return max((int(path.name.partition("-")[2]) for path in folders), default=0)


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text("utf-8"))


def write_yaml(path: Path, content: dict) -> None:
    path.write_text(yaml.safe_dump(content), "utf-8")


@pytest.fixture(scope="module")
def account(slurm_cluster, tmp_path_factory) -> Account:
    return Account(slurm_cluster, tmp_path_factory.mktemp("account") / "clone")


@pytest.fixture(scope="module")
def said(account) -> str:
    """The first three of the four commands, typed; the jobs that they submit have ended well."""
    said = account.type(*four_commands()[:3], answer="y\n")
    jobs = account.jobs()
    assert list(jobs) == list(PHASES)
    waits = r"pending \(.*Dependency"  # Slurm gives its reason some moments after the job
    wait_until(lambda: re.match(waits, account.status()["trained"]), "why phase 3 waits")
    assert account.cluster.wait(*jobs.values()) == ["COMPLETED"] * 5, account.status()
    return said


@pytest.fixture(scope="module")
def first_adapter(account, said) -> bytes:
    """Of the training that nothing interrupted."""
    return account.adapter.read_bytes()


def test_from_a_clone_to_the_report_with_four_commands(account, said):
    assert "Submit 5 jobs? [y/N]" in said
    assert "about 0.01 GPU-hours" in said
    assert len(re.findall(r"(?m)phase \d \w+: job \d+$", said)) == 5
    under_way = said[said.rindex("qwen3: ") :]
    assert re.search(r"phase 3 trained: pending \(.*job \d+", under_way)
    account.type(". .venv/bin/activate", four_commands()[3])
    page = (account.folder / "results/qwen3/report.html").read_text("utf-8")
    assert all(run in page for run in ("qwen3-8b-base", "qwen3-8b-control", "qwen3-8b-trained"))
    assert {phase: text.split()[0] for phase, text in account.status().items()} == dict.fromkeys(PHASES, "done")
    logs = "".join(path.read_text("utf-8") for path in account.folder.glob("results/qwen3/logs/*.log"))
    assert "FAILED" not in logs


def test_a_second_submission_finds_everything_done(account, said):
    before = account.jobs()
    assert "nothing to submit" in account.submit()
    assert account.jobs() == before


def test_a_training_that_fails_takes_phase_3_with_it(account, first_adapter):
    """The rest is done already and drops out; status says why, and the same submission goes on from there."""
    account.forget_training()
    text = account.folder / "text.jsonl"
    text.rename(text.with_suffix(".away"))
    text.write_text('{"words": "of another key"}\n', "utf-8")
    said = account.submit()
    assert "phase 2 control: done" in said
    jobs = account.jobs()
    assert account.cluster.wait(jobs["train"], jobs["trained"]) == ["FAILED", "CANCELLED"]
    status = account.status()
    assert status["train"].startswith("failed")
    assert f"{jobs['train']} FAILED" in status["train"]
    assert status["train"].count("FAILED: sparsekv train ended with status 2") == 1
    assert "text.jsonl" in status["train"]
    assert re.match(r"failed \(.* CANCELLED \(DependencyNeverSatisfied\)", status["trained"])
    assert not (account.folder / "results/qwen3/matrix/qwen3-8b-trained").exists()
    text.with_suffix(".away").rename(text)


def test_an_interrupted_training_is_the_one_that_never_was(account, first_adapter):
    """Cancelled, submitted again, preempted and requeued: it goes on from where it saved, and phase 3 follows."""
    if account.adapter.exists():
        account.forget_training()
    cluster = account.cluster
    account.submit(**ON_SECOND)
    cancelled = account.jobs()
    assert f"queued already, job {cancelled['train']}" in account.submit()
    assert account.jobs() == cancelled
    wait_until(lambda: account.steps > 5, "some steps")
    assert f"job {cancelled['train']} cancelled" in account.sparsekv("cancel", "--model", "qwen3")
    cluster.wait_for_processes(cancelled["train"])
    assert cluster.wait(cancelled["train"], cancelled["trained"]) == ["CANCELLED"] * 2
    done = account.saved
    assert 0 < done < STEPS
    assert not account.adapter.exists()
    account.submit(**ON_SECOND)
    jobs = account.jobs()
    wait_until(lambda: account.steps > done + 5, "more steps")
    cluster.call("sbatch", *IMPORTANT)
    wait_until(lambda: cluster.show(jobs["train"])["JobState"] == "PENDING", "the requeue")
    assert done < account.saved < STEPS
    assert account.status()["train"].startswith(f"pending (checkpoint of step {account.saved}; job {jobs['train']}")
    cluster.start_again(jobs["train"])
    assert cluster.wait(jobs["train"], jobs["trained"]) == ["COMPLETED"] * 2
    assert cluster.show(jobs["train"])["Restarts"] == "1"
    assert account.adapter.read_bytes() == first_adapter
    assert account.saved == STEPS
    assert "nothing to submit" in account.submit()
