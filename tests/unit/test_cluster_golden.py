"""What the configurations that come with the repository submit, word for word: tests/golden/.

After a change that is meant, write the files anew and look at the difference:

    WRITE_GOLDEN=1 pytest tests/unit/test_cluster_golden.py && git diff tests/golden
"""

import os
import subprocess

import pytest
from fake_slurm import ROOT, FakeSlurm

from sparsekv.cli import main

GOLDEN = ROOT / "tests/golden"
SITE = """\
account: physics
partition: gpu
qos: long
constraint: nvlink
gpu: h100
modules: [gcc/13, cuda/12.8]
venv: /envs/my sparsekv
conda: [first, second]
sbatch: [--exclude=node7, "--comment=it's $HOME"]
"""
PIPELINE = ("pipeline", "--model")
CASES = {
    "qwen3": [*PIPELINE, "qwen3"],
    "llama": [*PIPELINE, "llama"],
    "smollm2": [*PIPELINE, "smollm2"],
    "qwen3_site": [*PIPELINE, "qwen3", "--cluster", "site.yaml"],
    "llama_phase1": ["llama", "--batch", "8", "--gpus", "2"],
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A clone in which nothing is done; no site is set by the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SPARSEKV_")]:
        monkeypatch.delenv(name)
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "site.yaml").write_text(SITE)
    FakeSlurm(tmp_path / "bin", monkeypatch)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_what_is_submitted(name, repository, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["submit", *CASES[name], "--dry-run"])
    out, error = capsys.readouterr()
    assert ended.value.code == 0, error
    lines = [line.strip() for line in out.splitlines() if line.startswith("  ") and ".sh" in line]
    script = "".join(f"{line.replace('script: ', '# ')}\n" for line in lines)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    file = GOLDEN / f"sbatch_{name}.sh"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(script, "utf-8")
    assert script == file.read_text("utf-8"), "is it meant? the head of this test says what to do"


def test_no_file_is_left_over():
    assert {path.name for path in GOLDEN.iterdir()} == {f"sbatch_{name}.sh" for name in CASES}
