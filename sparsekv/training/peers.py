"""The end of another process of the same training, as one line."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import psutil
import torch

from sparsekv.errors import LostProcessError

LOST = "another process of this training has ended; the same command with --resume continues from the last checkpoint"
STUCK = 20.0  # seconds; torchrun and accelerate launch end their processes by force after 30


@contextlib.contextmanager
def others_alive(asked: Callable[[], bool]) -> Iterator[None]:
    """Inside, what cannot be exchanged with another process any more becomes one line.

    gloo says at once that a process is gone. NCCL waits: then the launcher's SIGTERM comes, and some time after it a
    thread says the line and ends the process, if the main thread still waits inside NCCL, where no handler in Python
    runs, or if another process of this launcher has ended: NCCL's work is queued, so that the main thread may well hear
    the signal, and wait only then, for ever. Whoever saves a large checkpoint beside others that live is left alone.
    Without a launcher nobody would force an end, so nobody has to be faster.

    Parameters
    ----------
    asked : callable
        Whether the handler has run.

    Raises
    ------
    LostProcessError
        In each process that is left and notices.
    """
    try:
        with _ended_if_stuck(asked) if "TORCHELASTIC_RUN_ID" in os.environ else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
            raise LostProcessError(LOST) from error
        raise


@contextlib.contextmanager
def _ended_if_stuck(asked: Callable[[], bool]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may watch signals
        yield
        return

    launcher, left = os.getppid(), threading.Event()
    beside = _workers(launcher)

    def another_ended() -> bool:
        """Whether one of the processes that the launcher has started here is no more, or the launcher itself."""
        known = beside == int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # no other program stands between
        return known and (os.getppid() != launcher or _workers(launcher) < beside)

    def watch() -> None:
        while number := reader.recv(1):  # nothing once the writer is closed
            if number[0] == signal.SIGTERM:
                if left.wait(STUCK):
                    return
                if not asked() or another_ended():
                    print(f"\nsparsekv: {LOST}", file=sys.stderr, flush=True)
                    os._exit(1)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(previous)
        writer.close()


def _workers(launcher: int) -> int:
    """How many processes of a launcher work on this machine."""
    try:
        return sum(map(_works, psutil.Process(launcher).children()))
    except psutil.NoSuchProcess:
        return 0


def _works(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ()  # of a process that has ended, and nobody asked how, it is empty
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
