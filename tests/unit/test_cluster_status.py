"""Status and cancel: what artefacts say, then what fake Slurm commands say."""

import os
import platform
from pathlib import Path

import psutil
import pytest
import yaml
from cells import write_cell
from fake_slurm import FakeSlurm, make_experiment

from sparsekv.cli import main
from sparsekv.cluster import slurm
from sparsekv.cluster.book import Book, Entry
from sparsekv.cluster.tail import last_lines


@pytest.fixture
def site(tmp_path, monkeypatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    make_experiment(tmp_path)
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def said(capsys):
    """Function from arguments to what the command prints."""

    def run(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        assert int(ended.value.code or 0) == status, captured.err
        return captured.out + captured.err

    return run


def test_nothing_yet(site, said):
    assert "nothing was submitted yet" in said("status")
    out = said("status", "--model", "tiny")
    assert out.count("not submitted") == 5 + 3, "phases, and runs of the matrix"
    assert not site.calls("squeue"), "there is nothing to ask about"


def test_running_and_waiting(site, said):
    said("submit", "pipeline", "--model", "tiny", "--yes")
    log = Path("results/tiny/logs/analyze-101.log")
    log.write_text("one\n" * 9 + "rows: 1/20\rrows: 3/20\n")
    site.say("squeue", "101|101|RUNNING|None\n102|102_0|PENDING|Dependency\n103|103|PENDING|Dependency\n")
    out = said("status")
    assert "phase 0 analyze: running (nothing yet; job 101: 1 RUNNING)" in out
    assert "      rows: 3/20\n" in out
    assert out.count("      one\n") == 4
    assert "phase 1 baseline: pending (0 of 2 cells done; job 102: 1 PENDING (Dependency))" in out
    assert "base, ruler:4096: 2 pending (job 102: 1 PENDING (Dependency))" in out


def test_cells(site, said):
    """One done, one that cannot run, one begun: the words follow the job."""
    said("submit", "tiny", "--yes")
    site.say("squeue", "101|101_0|RUNNING|None\n")
    settings = {"adapter_fingerprint": None, "context_length": None, "tasks": None, "max_context_length": None}
    settings |= {"enable_thinking": False, "num_generations": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    cells = []
    for press, ratio in (("no_press", 0.0), ("knorm", 0.5)):
        out = Path("results/tiny/matrix/base")
        cells.append(write_cell(out, press, ratio, {"a": [1]}, data=("ruler", "4096"), **settings))
        text = (cells[-1] / "config.yaml").read_text()
        (cells[-1] / "config.yaml").write_text(f"{text}seed: 0\n")
    (cells[1] / "metrics.json").unlink()
    assert "base, ruler:4096: 1 done, 1 running\n" in said("status")
    (cells[1] / "unavailable.json").write_text('{"reason": "the Hub is out of reach"}')
    out = said("status")
    assert "phase 1 baseline: done (1 of 2 cells done, 1 cannot run)" in out
    assert "failed: base, ruler:4096, knorm 0.5: the Hub is out of reach" in out
    (cells[0] / "profile.json").unlink()
    assert "base, ruler:4096: 1 running, 1 failed\n" in said("status")


def test_why_a_job_failed(site, said):
    said("submit", "pipeline", "--model", "tiny", "--yes")
    Path("results/tiny/logs/control-103.log").write_text("sparsekv: --data x: no such file\nFAILED: status 2\n")
    site.say("scontrol", "JobId=103 JobName=x JobState=FAILED Reason=NonZeroExitCode Dependency=(null) ExitCode=2:0\n")
    out = said("status")
    assert "phase 2 control: failed (nothing yet; job 103: 103 FAILED (NonZeroExitCode))" in out
    assert "      sparsekv: --data x: no such file\n      FAILED: status 2\n" in out
    site.fail("scontrol", "slurm_load_jobs error: Invalid job id specified")
    assert "phase 2 control: failed (nothing yet; job 103: ended; Slurm forgot how)" in said("status")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "slurm_load_jobs error: Unable"),
        ("exec sleep 30", "no answer in 0.2 s; is Slurm's controller up?"),
        (None, "not found here; run this on a login node of the cluster"),
    ],
)
def test_artefacts_without_slurm(site, said, monkeypatch, program, why):
    """No answer, none in time, no Slurm: one line, for all models together."""
    content = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    content["models"]["other"] = {**content["models"]["tiny"], "results": "results/other"}
    Path("configs/pipeline.yaml").write_text(yaml.safe_dump(content))
    said("submit", "tiny", "--yes")
    said("submit", "other", "--yes")
    if program is None:
        monkeypatch.setenv("PATH", "")
    else:
        site.program("squeue", f"#!/bin/sh\necho >> {site.folder}/asked\n{program}\n")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.2)
    out = said("status")
    assert out.count(f"what waits or runs is not known: squeue: {why}") == 1
    assert program is None or (site.folder / "asked").read_text() == "\n", "a second call would wait as long again"
    assert "phase 1 baseline: unknown (0 of 2 cells done; job 101)" in out
    assert "phase 1 baseline: unknown (0 of 2 cells done; job 102)" in out


def test_cancel(site, said):
    said("submit", "pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "103|103|RUNNING|None\n105|105_0|PENDING|x\n105|105_1|PENDING|x\n777|777|RUNNING|other\n")
    out = said("cancel", "--model", "tiny")
    assert out.splitlines() == ["tiny, control: job 103 cancelled", "tiny, trained: job 105 cancelled"]
    assert site.calls("scancel") == [["103", "105"]]
    site.say("squeue", "")
    assert "nothing waits or runs" in said("cancel")
    assert "known are tiny" in said("cancel", "--model", "other", status=2)


def test_a_corrupt_list_of_jobs(site, said):
    Path("results/tiny").mkdir(parents=True)
    Path("results/tiny/jobs.json").write_text("{")
    for command in ("status", "cancel"):
        assert "results/tiny/jobs.json: corrupt" in said(command, status=2)
    assert "corrupt" in said("submit", "tiny", "--yes", status=2)


def test_another_process_with_the_number_is_not_ours():
    born = psutil.Process().create_time()
    make = {"phase": "x", "number": str(os.getpid()), "fingerprint": "", "executor": "local", "log": ""}
    assert Entry(**make, born=born).running
    assert not Entry(**make, born=born - 100).running
    assert not Entry(**make, born=born, host=platform.node() + "2").running


def test_one_submit_at_a_time(tmp_path):
    from sparsekv.errors import UserError

    with Book(tmp_path).held(), pytest.raises(UserError, match="another sparsekv submit"), Book(tmp_path).held():
        pass


def test_the_end_of_a_log(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * 9000 + b"\n\n\x1b[31mred\n50%\r100%\nbad \xff byte\n")
    assert last_lines(path, 3) == ["[31mred", "100%", "bad \N{REPLACEMENT CHARACTER} byte"]
    assert last_lines(tmp_path / "none") == []
