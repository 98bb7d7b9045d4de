"""What a process of a training says when another has ended."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from sparsekv.errors import LostProcessError
from sparsekv.signals import StopSignal
from sparsekv.training import peers
from sparsekv.training.peers import others_alive


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10670."),
        torch.distributed.DistBackendError("NCCL error in: …, remote process exited"),
    ],
)
def test_what_cannot_be_exchanged_is_one_line(error):
    with pytest.raises(LostProcessError, match=r"^another process .* --resume"), others_alive(lambda: False):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="out of memory"), others_alive(lambda: False):
        raise RuntimeError("out of memory")


@pytest.fixture
def launched(monkeypatch):
    """Two processes, as if this one were their launcher and its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "getppid", os.getpid)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes = [subprocess.Popen(command, env={**os.environ, "LOCAL_RANK": rank}) for rank in "01"]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def kill(process, reaped=True):
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))


def test_one_that_has_stopped_in_order_is_left_alone(launched, monkeypatch, capfd):
    """Though the others end, as they should: it may have to write something."""
    monkeypatch.setattr(peers, "STUCK", 0.3)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignal() as stop, others_alive(lambda: stop.number is not None):
        os.kill(os.getpid(), signal.SIGTERM)
    kill(launched[1])
    time.sleep(0.6)
    assert not ended
    assert "another process" not in capfd.readouterr().err


def test_one_whose_launcher_has_ended_says_so_too(launched, monkeypatch):
    monkeypatch.setattr(peers, "STUCK", 0.3)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignal() as stop, others_alive(lambda: stop.number is not None):
        monkeypatch.setattr(os, "getppid", lambda: 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)
    assert ended == [1]


def test_other_children_of_the_parent_are_no_neighbours(launched, monkeypatch):
    """A program between the launcher and its process has one child, however many processes there are."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(peers, "STUCK", 0.3)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignal() as stop, others_alive(lambda: stop.number is not None):
        kill(launched[1])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)
    assert not ended


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_one_that_hears_the_signal_ends_where_another_has_ended(killed, reaped, launched, monkeypatch, capfd):
    """As with NCCL, whose work is queued: the main thread is free, and what it waits for later never comes."""
    monkeypatch.setattr(peers, "STUCK", 0.3)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignal() as stop, others_alive(lambda: stop.number is not None):
        if killed:
            kill(launched[1], reaped)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)
    assert ended == [1] * killed
    assert capfd.readouterr().err.count("sparsekv: another process") == killed


@pytest.mark.parametrize("stuck", [True, False])
def test_one_that_waits_inside_nccl_ends_when_the_launcher_asks(stuck, launched, monkeypatch, capfd):
    monkeypatch.setattr(peers, "STUCK", 0.3)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    alarm = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    with StopSignal() as stop, others_alive(lambda: stop.number is not None):
        alarm.start()
        if stuck:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds in which no handler runs, as in NCCL
        else:
            time.sleep(0.6)
    alarm.join()
    assert ended == [1] * stuck
    assert capfd.readouterr().err.count("sparsekv: another process") == stuck
    assert signal.set_wakeup_fd(-1) == -1
