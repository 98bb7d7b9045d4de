"""Slurm's commands: each with a timeout, its error shown as it is, its output in columns that do not change."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekv.errors import UserError, require

TIMEOUT = 60  # seconds; with no controller up the commands would hang for minutes
FILTERS = ("SQUEUE_", "SACCT_")  # a user's variables that would hide jobs
BY_USER = "by user "
NEVER = "DependencyNeverSatisfied"  # the reason of a job that waits all the same, on some sites
ENDED = (
    "COMPLETED",
    "COMPLETING",
    "CANCELLED",
    "FAILED",
    "PREEMPTED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as Slurm sees it.

    Attributes
    ----------
    number : str
        The job's id, which all tasks of an array share.
    task : str
        The id with the task: 12_3.
    state : str
        PENDING, RUNNING, FAILED, …
    reason : str
        Why it waits, or how it ended.
    """

    number: str
    task: str
    state: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.task} {self.state}" + (f" ({self.reason})" if self.reason else "")

    @property
    def failed(self) -> bool:
        """Whether it ended, and not well."""
        return self.state in ENDED and not self.state.startswith("COMPLET")


def check_available() -> None:
    """Raise UserError where this machine does not have Slurm's commands."""
    there = shutil.which("sbatch") is not None
    require(there, "sbatch: not found here; run this on a login node of the cluster, or give --executor local")


def call(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command prints; no shell takes part, so no word can run anything, and no Ctrl-C reaches it.

    Raises
    ------
    UserError
        There is no such command, it does not answer in time, or it fails: with its own words.
    """
    names = os.environ if environment is None else environment
    names = {name: value for name, value in names.items() if not name.startswith(FILTERS)}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        done = subprocess.run([*words], env=names, timeout=TIMEOUT, start_new_session=True, **pipes)
    except FileNotFoundError as error:
        raise UserError(f"{words[0]}: not found here; run this on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{words[0]}: no answer in {TIMEOUT} s; is Slurm's controller up?") from error
    except (OSError, ValueError) as error:  # not executable, or a word with a NUL
        raise UserError(f"{words[0]}: cannot be run ({error})") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()).removeprefix(f"{words[0]}: ")
        raise UserError(f"{words[0]}: {said or f'ended with status {done.returncode}'}")
    return done.stdout


def submit(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """Submit by an sbatch line that has --parsable; returns the job's id."""
    said = call(words, environment)
    number = said.strip().splitlines()[-1].partition(";")[0] if said.strip() else ""
    if not re.fullmatch(r"\d+", number):
        raise UserError(f"sbatch: said {said.strip()!r} instead of a job's id")
    return number


def queued(numbers: Iterable[str]) -> list[Job]:
    """Those of the jobs that wait or run, by their tasks."""
    wanted = set(numbers)
    if not wanted:
        return []
    lines = call(["squeue", "--me", "--noheader", "--array", "--format=%F|%i|%T|%r"]).splitlines()
    jobs = [Job(*parts) for line in lines if len(parts := line.strip().split("|", 3)) == 4]
    return [job for job in jobs if job.number in wanted]


def history(number: str) -> list[Job]:
    """How a job that no longer waits or runs ended, as far as this site remembers.

    sacct knows all tasks and who cancelled, where there is accounting. scontrol knows why, for some minutes.
    """
    accounted = ["sacct", "-n", "-P", "-X", "-j", number, "--format=JobID,State,ExitCode"]
    jobs = [_accounted(number, *parts) for line in _lines(accounted) if len(parts := line.split("|")) == 3]
    shown = [_shown(number, line) for line in _lines(["scontrol", "-o", "show", "job", number]) if "JobState=" in line]
    by_user = [job for job in jobs if job.reason.startswith(BY_USER)]
    found = {job.task: job for job in (*jobs, *shown, *by_user)}
    return sorted(found.values(), key=lambda job: (len(job.task), job.task))


def _lines(words: Sequence[str]) -> list[str]:
    """What a command prints; nothing where the site does not have it, or the job is forgotten."""
    try:
        return call(words).splitlines()
    except UserError:
        return []


def _accounted(number: str, task: str, state: str, code: str) -> Job:
    """A line of sacct: the state may be `CANCELLED by 1000`."""
    word, _, user = state.partition(" by ")
    return Job(number, task, word, f"{BY_USER}{user}" if user else _status(code))


def _shown(number: str, line: str) -> Job:
    """A line of `scontrol -o show job`."""
    fields = dict(re.findall(r"(?:^| )(JobState|Reason|ExitCode|ArrayTaskId)=(\S*)", line))
    which = fields.get("ArrayTaskId", "")
    task = number if not which else f"{number}_{which}" if which.isdecimal() else f"{number}_[{which}]"
    reason = fields.get("Reason", "None")
    return Job(number, task, fields["JobState"], reason if reason != "None" else _status(fields.get("ExitCode", "0:0")))


def _status(code: str) -> str:
    """Of Slurm's STATUS:SIGNAL, which says nothing where it is 0:0."""
    return f"exit code {code}" if code != "0:0" else ""


def cancel(numbers: Sequence[str]) -> None:
    """Cancel jobs; those that have ended meanwhile are no error."""
    if numbers:
        call(["scancel", *numbers])
