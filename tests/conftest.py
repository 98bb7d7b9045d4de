"""Fixtures of all tests. Nothing here or in the tests asks the model hub for anything."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import make_tiny, make_tiny_tokenizer  # pytest puts the folder of a conftest.py on the path
from transformers.utils.logging import disable_progress_bar

torch.set_num_threads(1)
disable_progress_bar()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With several workers (`-n`), what a file makes once stays with one of them; there is only one Slurm.

    Files with slow tests come first, so that no worker is left with one when the others are done.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("slurm")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("slurm" if file.startswith("tests/slurm/") else file))


@pytest.fixture
def tiny_llama():
    """Factory of a tiny Llama; keyword arguments change its config."""
    return partial(make_tiny, "llama")


@pytest.fixture
def tiny_qwen3():
    """Factory of a tiny Qwen3; keyword arguments change its config."""
    return partial(make_tiny, "qwen3")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Tokenizer that fits the tiny models."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the real SmolLM2-135M; for slow tests only."""
    from sparsekv.demo_model import demo_model_folder

    return demo_model_folder()
