"""Being asked to stop: the work in hand is finished first."""

import signal
import threading
import time
from types import FrameType
from typing import Any

ECHO = 2.0  # seconds: launchers pass on a Ctrl-C that their processes already got


class StopSignal:
    """From `watch` to `restore`, SIGTERM and SIGINT are only remembered, the first as `number`.

    SIGTERM may come again and again: launchers and Slurm repeat it, and have SIGKILL for whoever is too slow. SIGINT is
    a person: another one, when the first signal is `ECHO` seconds old, acts at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def watch(self) -> None:
        """Begin; does nothing outside the main thread, which alone may set handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > ECHO:
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __enter__(self) -> "StopSignal":
        self.watch()
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()
