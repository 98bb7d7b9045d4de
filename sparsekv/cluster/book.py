"""The small file of submitted jobs beside a model's results: results/KEY/jobs.json."""

import contextlib
import json
import platform
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from sparsekv.errors import UserError
from sparsekv.files import check_writable, held, write_json, writing

SLURM, LOCAL = "slurm", "local"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED = {
    *(128 + number for number in SIGNALS),
    *(-number for number in SIGNALS),
}  # it saved; it was not listening yet


@dataclass(frozen=True)
class Entry:
    """A job that was submitted, or a process that was started.

    Attributes
    ----------
    phase : str
    number : str
        Slurm's id, or the process's.
    fingerprint : str
        `Phase.fingerprint`.
    executor : str
        slurm or local.
    log : str
        Its log; for an array the pattern of its tasks' logs.
    host : str
        Of the process.
    born : float
        When the process began, so that another with its number is not taken for it.
    status : int or None
        The process's exit status, once known.
    submitted : str
    """

    phase: str
    number: str
    fingerprint: str
    executor: str
    log: str
    host: str = field(default_factory=platform.node)
    born: float = 0.0
    status: int | None = None
    submitted: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def title(self) -> str:
        """`job 12`, `process 345`."""
        return f"{'job' if self.executor == SLURM else 'process'} {self.number}"

    @property
    def stopped(self) -> bool:
        """Whether somebody stopped the process."""
        return self.status in STOPPED

    @property
    def running(self) -> bool:
        """Whether a local process is still there; always false for a job of Slurm, which squeue knows about."""
        if self.executor != LOCAL or self.host != platform.node():
            return False
        try:
            return abs(psutil.Process(int(self.number)).create_time() - self.born) < 1
        except (psutil.Error, ValueError):
            return False


class Book:
    """Entries of a model, newest last.

    Parameters
    ----------
    folder : Path
        Of the model's results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "jobs.json"
        self.logs = folder / "logs"

    def entries(self) -> list[Entry]:
        """All of them; raises UserError when the file is corrupt or somebody else's."""
        try:
            return [Entry(**entry) for entry in json.loads(self.file.read_text("utf-8"))]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.file}: corrupt; cancel its jobs with scancel, then delete it") from error

    def add(self, *entries: Entry) -> None:
        """Write entries down; one with a number that is there replaces that."""
        new = {(entry.executor, entry.number, entry.born) for entry in entries}
        kept = [entry for entry in self.entries() if (entry.executor, entry.number, entry.born) not in new]
        with writing(self.folder, "results"):
            write_json(self.file, [asdict(entry) for entry in (*kept, *entries)])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other call submits for this model; the folder of the logs is there.

        Raises
        ------
        UserError
            Another call is at work, or the folder cannot be written.
        """
        check_writable(self.logs, "logs")
        with writing(self.logs, "logs"):
            self.logs.mkdir(parents=True, exist_ok=True)
        with held(self.folder / ".jobs.lock", f"{self.folder}: another sparsekv submit is at work on it"):
            yield
