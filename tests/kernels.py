"""Triton kernels under test: on a GPU, or on a CPU by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")


def check_interpreted(file: str) -> None:
    """Run the other tests of a file where kernels are interpreted."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", file, "-k", "not interpreter"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton does not work with this numpy")
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
