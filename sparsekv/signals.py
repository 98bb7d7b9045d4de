"""Being asked to stop: the work in hand is finished first."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """From `watch` to `restore`, the first SIGTERM or SIGINT is only remembered as `number`; a second acts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def watch(self) -> None:
        """Begin; does nothing outside the main thread, which alone may set handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._previous[number])

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
