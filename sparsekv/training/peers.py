"""The end of another process of the same training, as one line."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch

from sparsekv.errors import LostProcessError

LOST = "another process of this training has ended; the same command with --resume continues from the last checkpoint"
STUCK = 20.0  # seconds; torchrun and accelerate launch end their processes by force after 30


@contextlib.contextmanager
def others_alive(asked: Callable[[], bool]) -> Iterator[None]:
    """Inside, what cannot be exchanged with another process any more becomes one line.

    gloo says at once that a process is gone. NCCL waits: then the launcher's SIGTERM comes, which no handler in Python
    sees while the main thread waits inside NCCL, and a thread says the line and ends the process. In training that
    goes on, however slow, the handler runs within moments. Without a launcher nobody would force an end, so nobody has
    to be faster, and whoever saves a large checkpoint is left alone.

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

    def watch() -> None:
        while number := reader.recv(1):  # nothing once the writer is closed
            if number[0] == signal.SIGTERM:
                time.sleep(STUCK)
                if not asked():
                    print(f"\nsparsekv: {LOST}", file=sys.stderr, flush=True)
                    os._exit(1)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()
