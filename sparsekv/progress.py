"""How far a long run is: a bar on a terminal, a line now and then in a log."""

import logging
import os
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

EVERY = 60.0  # seconds between lines


def speaks() -> bool:
    """Whether this process is alone, or the one that speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


class CountProgress:
    """Counts what is done; a context manager. Of several processes of a launcher one shows it.

    Parameters
    ----------
    what : str
        What is counted, in the plural.
    total : int
        How many there are to do.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._said = time.monotonic()
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not (console.is_terminal and speaks()))
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "CountProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """More are done, whoever did them."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if self._bar.disable and speaks() and self._done and now - self._said >= EVERY:
            self._said = now
            left = (now - self._started) / self._done * (self._total - self._done)
            logger.info("%d of %d %s, %.0f minutes left", self._done, self._total, self._what, left / 60)
