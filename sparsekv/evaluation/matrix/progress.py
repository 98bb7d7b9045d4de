"""How far a long run is: a bar on a terminal, a line now and then in a log."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

EVERY = 60.0  # seconds between lines


class AnswersProgress:
    """Counts answers; a context manager.

    Parameters
    ----------
    total : int
        Answers to get.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._said = time.monotonic()
        columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("answers", total=total)

    def __enter__(self) -> "AnswersProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """More answers are known, whoever gave them."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if self._bar.disable and self._done and now - self._said >= EVERY:
            self._said = now
            left = (now - self._started) / self._done * (self._total - self._done)
            logger.info("%d of %d answers, %.0f minutes left", self._done, self._total, left / 60)
