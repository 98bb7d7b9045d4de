"""scripts/slurm_lib.sh in a plain shell: environments, processes and how they end; `sparsekv` is a stand-in."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import ROOT, wait_until

SYSTEM = "/usr/bin:/bin"
SAYS_RANK = "echo rank=$RANK of=$WORLD_SIZE local=$LOCAL_RANK at=$MASTER_ADDR:$MASTER_PORT args=$*"


@pytest.fixture
def shell(tmp_path):
    """Start a line of bash as a job would be, with programs of one's own in front of the others."""

    def start(line: str, programs: dict[str, str], **environment: str) -> subprocess.Popen:
        folder = tmp_path / "programs"
        folder.mkdir()
        for name, body in programs.items():
            write_program(folder / name, body)
        names = {"PATH": f"{folder}:{SYSTEM}", "SLURM_JOB_ID": "40007", **environment}
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SPARSEKV", "CONDA"))
        }
        job = f"set -euo pipefail; cd {tmp_path}; . {ROOT}/scripts/slurm_lib.sh; PAUSE=0.1; {line}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "-c", job], env=kept | names, **pipes)

    return start


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n", "utf-8")
    path.chmod(0o755)


def result(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


# ---- processes ----


def test_a_training_is_one_process_a_gpu(shell):
    programs = {"python": "echo 3", "sparsekv": SAYS_RANK}
    status, output = result(shell("run_together train --lr 1", programs))
    assert status == 0
    lines = sorted(line for line in output.splitlines() if line.startswith("rank="))
    assert lines == [f"rank={i} of=3 local={i} at=localhost:10007 args=train --lr 1" for i in range(3)]


def test_a_training_on_nodes_counts_on(shell):
    programs = {"python": "echo 2", "sparsekv": SAYS_RANK}
    status, output = result(shell("NODES=3 NODE=1 MASTER_NODE=there; run_together train", programs))
    assert status == 0
    lines = sorted(line for line in output.splitlines() if line.startswith("rank="))
    assert lines == [f"rank={2 + i} of=6 local={i} at=there:10007 args=train" for i in range(2)]


@pytest.mark.parametrize(
    ("gpus", "arguments", "expected"),
    [
        (0, "", [""]),
        (1, "", [""]),
        (3, "", ["--device cuda:0", "--device cuda:1", "--device cuda:2"]),
        (3, "--device=auto", ["--device=auto"]),
    ],
)
def test_an_evaluation_is_one_process_a_gpu(shell, gpus, arguments, expected):
    programs = {"python": f"echo {gpus}", "sparsekv": 'echo "rank=${RANK:-none}" "$@"'}
    status, output = result(shell(f"run_apart eval {arguments}", programs))
    assert status == 0
    assert sorted(output.splitlines()) == [f"rank=none eval {more}".rstrip() for more in expected]


def test_arguments_arrive_as_they_are(shell, tmp_path):
    programs = {"sparsekv": "printf '<%s>' \"$@\""}
    line = "run_one analyze --model 'a \"b\" $(touch evil) `touch evil`'"
    assert result(shell(line, programs)) == (0, '<analyze><--model><a "b" $(touch evil) `touch evil`>')
    assert not (tmp_path / "evil").exists()


def test_one_that_fails_ends_its_training(shell):
    """The others would wait for it for ever; the status is that of the one that failed."""
    programs = {"sparsekv": "[ $RANK = 1 ] && exit 7; trap '' TERM; exec sleep 300"}
    status, output = result(shell("GRACE=1; run_together train", programs, SPARSEKV_PROCESSES="3"))
    assert status == 7
    assert output.splitlines()[-1].endswith("FAILED: sparsekv train ended with status 7")


def test_one_that_fails_leaves_the_others_to_evaluate(shell):
    programs = {"sparsekv": "if mkdir first 2>/dev/null; then exit 7; fi; sleep 2; echo done"}
    status, output = result(shell("GRACE=0; run_apart eval", programs, SPARSEKV_PROCESSES="2"))
    assert status == 7
    assert "done" in output.splitlines()


# ---- signals ----

SAVES = "trap 'echo saved; kill $!; exit 143' TERM; touch ready-$$; sleep 300 & wait"


def test_asked_for_the_node_all_save_and_the_job_queues_again(shell, tmp_path):
    programs = {"sparsekv": SAVES, "scontrol": "echo scontrol $*"}
    process = shell("run_together train", programs, SPARSEKV_PROCESSES="2")
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both processes")
    process.send_signal(signal.SIGUSR1)
    status, output = result(process)
    assert status == 0
    assert output.splitlines().count("saved") == 2
    assert output.splitlines()[-1] == "scontrol requeue 40007"


def test_a_site_without_requeue(shell, tmp_path):
    programs = {"sparsekv": SAVES, "scontrol": "echo not allowed; exit 1"}
    process = shell("run_one analyze", programs)
    wait_until(lambda: list(tmp_path.glob("ready-*")), "the process")
    process.send_signal(signal.SIGUSR1)
    status, output = result(process)
    assert status == 143
    assert "FAILED: job 40007 cannot be queued again" in output


def test_terminated_it_neither_sends_the_signal_again_nor_queues_again(shell, tmp_path):
    """Slurm has sent it to every process; the job waits until they have saved."""
    programs = {"sparsekv": SAVES, "scontrol": "echo scontrol $*"}
    process = shell("run_one train", programs)
    wait_until(lambda: list(tmp_path.glob("ready-*")), "the process")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    (ready,) = tmp_path.glob("ready-*")
    os.kill(int(ready.name.partition("-")[2]), signal.SIGTERM)
    status, output = result(process)
    assert status == 143
    assert output.splitlines().count("saved") == 1
    assert "scontrol" not in output
    assert "FAILED" not in output


# ---- environments ----

WHICH = "activate_environment; command -v sparsekv"


def make_environment(folder: Path) -> Path:
    """What a virtual environment looks like to the job."""
    (folder / "bin").mkdir(parents=True)
    write_program(folder / "bin" / "sparsekv", "")
    (folder / "bin" / "activate").write_text(f'PATH={folder}/bin:$PATH; : "$UNSET_AND_ALLOWED"\n')
    return folder / "bin" / "sparsekv"


CONDA = """
case "$*" in
"shell.bash hook") echo 'conda() { [ -d "envs/$2" ] && PATH=$PWD/envs/$2/bin:$PATH; }' ;;
esac"""


def test_the_active_environment_comes_first(shell, tmp_path):
    make_environment(tmp_path / ".venv")
    assert result(shell(WHICH, {"sparsekv": ""})) == (0, f"{tmp_path}/programs/sparsekv\n")


def test_then_the_one_in_this_folder(shell, tmp_path):
    there = make_environment(tmp_path / ".venv")
    make_environment(tmp_path / "envs/sparsekv")
    assert result(shell(WHICH, {"conda": CONDA})) == (0, f"{there}\n")


def test_then_those_of_conda_in_order(shell, tmp_path):
    (tmp_path / "envs/empty/bin").mkdir(parents=True)
    there = make_environment(tmp_path / "envs/full")
    make_environment(tmp_path / "envs/later")
    names = {"SPARSEKV_CONDA": "missing empty full later"}
    assert result(shell(WHICH, {"conda": CONDA}, **names)) == (0, f"{there}\n")


def test_the_one_that_is_named(shell, tmp_path):
    there = make_environment(tmp_path / "mine")
    make_environment(tmp_path / ".venv")
    assert result(shell(WHICH, {"sparsekv": ""}, SPARSEKV_ENV=str(tmp_path / "mine"))) == (0, f"{there}\n")


def test_modules_are_loaded_before(shell, tmp_path):
    there = make_environment(tmp_path / "modules/tools")
    (tmp_path / "init").mkdir()
    (tmp_path / "init/bash").write_text('module() { [ -d "modules/$2" ] && PATH=$PWD/modules/$2/bin:$PATH; }\n')
    names = {"MODULESHOME": str(tmp_path), "SPARSEKV_MODULES": "tools"}
    assert result(shell(WHICH, {}, **names)) == (0, f"{there}\n")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({}, "no environment with sparsekv"),
        ({"SPARSEKV_ENV": "no/such"}, "SPARSEKV_ENV=no/such: "),
        ({"SPARSEKV_MODULES": "none"}, "SPARSEKV_MODULES: no module none"),
        ({"SPARSEKV_CONDA": "one two"}, "no environment with sparsekv"),
    ],
)
def test_no_environment_is_one_line(shell, names, said):
    status, output = result(shell(WHICH, {}, **names))
    assert status == 1
    (line,) = output.splitlines()
    assert f"FAILED: {said}" in line
