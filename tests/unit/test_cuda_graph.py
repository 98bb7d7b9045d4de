"""What is decided around a capture; what is captured needs a GPU (tests/gpu/test_decode.py)."""

import contextlib

import pytest
import torch

from sparsekv import cuda_graph


@pytest.fixture
def gpu(monkeypatch):
    """Stands for a GPU: the mode that waiting for it is in, and how many graphs were captured."""
    state = {"mode": 0, "captured": 0}

    @contextlib.contextmanager
    def graph(graph, stream):
        assert state["mode"] == 0
        assert stream == "stream of 0"
        state["captured"] += 1
        yield

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: state["mode"])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: state.update(mode=mode))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_graph, "_capture_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return state


def test_a_step_that_never_waits(gpu, caplog):
    modes = []
    captured = cuda_graph.capture(lambda: modes.append(gpu["mode"]), lambda: torch.ones(1))
    assert captured[1] == 1
    assert modes == [0, "error"]
    assert gpu == {"mode": 0, "captured": 1}
    assert not caplog.records


def test_a_step_that_waits_is_not_captured(gpu, caplog):
    def wait():
        if gpu["mode"] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert cuda_graph.capture(wait, wait) is None
    assert gpu == {"mode": 0, "captured": 0}
    assert caplog.messages == ["decoding without a CUDA graph: called a synchronizing CUDA operation"]


def test_without_memory_the_caller_decides(gpu):
    def fail():
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(torch.cuda.OutOfMemoryError):
        cuda_graph.capture(fail, fail)
    assert gpu == {"mode": 0, "captured": 0}
