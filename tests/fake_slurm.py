"""Slurm's commands as small programs that record their arguments, and an experiment of tiny files to submit."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COMMAND = """#!{python} -S
import json, os, sys
folder, name = {folder!r}, {name!r}
path = lambda what: os.path.join(folder, name + what)
with open(path(".calls"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if os.path.exists(path(".fails")):
    sys.exit(open(path(".fails")).read())
if name == "sbatch":
    refused = os.path.exists(path(".refuses")) and open(path(".refuses")).read()
    if refused and any(refused in word for word in sys.argv):
        sys.exit("sbatch: error: " + refused + " refused")
    print(100 + len(open(path(".calls")).readlines()))
elif os.path.exists(path(".says")):
    print(open(path(".says")).read(), end="")
"""


class FakeSlurm:
    """`sbatch`, `squeue`, `scancel`, `sacct`, `scontrol` in a folder that is put first on PATH."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue", "scancel", "sacct", "scontrol"):
            self.program(name, COMMAND.format(python=sys.executable, folder=str(folder), name=name))
        self.fail("sacct", "Slurm accounting storage is disabled")
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def program(self, name: str, text: str) -> None:
        """Put a program on PATH."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call so far."""
        file = self.folder / f"{name}.calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def say(self, name: str, text: str) -> None:
        """What a command prints from now on."""
        (self.folder / f"{name}.says").write_text(text)

    def fail(self, name: str, text: str) -> None:
        """A command fails from now on, with these words."""
        (self.folder / f"{name}.fails").write_text(text)

    def refuse(self, word: str) -> None:
        """sbatch refuses lines that have this in them."""
        (self.folder / "sbatch.refuses").write_text(word)


def make_experiment(folder: Path, model: str = "tiny", **changes: Any) -> None:
    """An experiment with one model, `tiny`, in a folder with links to the scripts."""
    (folder / "configs").mkdir()
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "configs" / "cluster.yaml").write_text("")
    runs = {"base": {"model": model}}
    runs |= {name: {"model": model, "adapter": f"out/{name}/final"} for name in ("control", "trained")}
    matrix = {
        "runs": runs,
        "presses": ["knorm"],
        "ratios": [0.5],
        "benchmarks": [{"name": "ruler", "data_dir": "4096"}],
    }
    files = {"train": {"model": model, "data": "pydoc"}, "matrix": matrix}
    entry = {"model": model, "billions": 0.001, "train": "configs/train.yaml", "matrix": "configs/matrix.yaml"}
    entry |= {
        "train_script": "scripts/slurm_phase2_train.sh",
        "base": "base",
        "control": "control",
        "trained": "trained",
    }
    files["pipeline"] = {"models": {"tiny": entry | changes}}
    for name, content in files.items():
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(content))
