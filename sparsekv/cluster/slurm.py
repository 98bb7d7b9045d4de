"""Slurm's commands: each with a timeout, its error shown as it is, its output in columns that do not change."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsekv.errors import UserError

TIMEOUT = 60  # seconds; with no controller up the commands would hang for minutes
NEVER = "DependencyNeverSatisfied"  # the reason of a job that waits all the same, on some sites
ENDED = (
    "COMPLETED",
    "COMPLETING",
    "CANCELLED",
    "FAILED",
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

    @property
    def failed(self) -> bool:
        """Whether it ended, and not well."""
        return self.state in ENDED and not self.state.startswith("COMPLET")


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def call(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command prints; no shell takes part, so no word can run anything.

    Raises
    ------
    UserError
        There is no such command, it does not answer in time, or it fails: with its own words.
    """
    try:
        done = subprocess.run(
            [*words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
        )
    except FileNotFoundError as error:
        local = "run this on a login node of the cluster, or give --executor local"
        raise UserError(f"{words[0]}: not found here; {local}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{words[0]}: no answer in {TIMEOUT} s; is Slurm's controller up?") from error
    except (OSError, ValueError) as error:  # not executable, or a word with a NUL
        raise UserError(f"{words[0]}: cannot be run ({error})") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
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
    """How a job that no longer waits or runs ended, as far as this site remembers: by sacct, else by scontrol."""
    try:
        lines = call(["sacct", "-n", "-P", "-X", "-j", number, "--format=JobID,State,ExitCode"]).splitlines()
        found = [line.split("|") for line in lines if line.count("|") == 2]
        if found:
            return [Job(number, task, state.split()[0], f"exit code {code}") for task, state, code in found]
    except (UserError, IndexError):  # no accounting here
        pass
    try:
        lines = call(["scontrol", "-o", "show", "job", number]).splitlines()
    except UserError:  # forgotten
        return []
    return [_shown(number, line) for line in lines if "JobState=" in line]


def _shown(number: str, line: str) -> Job:
    """A line of `scontrol -o show job`."""
    fields = dict(re.findall(r"(?:^| )(JobState|Reason|ExitCode|ArrayTaskId)=(\S*)", line))
    task = f"{number}_{fields['ArrayTaskId']}" if "ArrayTaskId" in fields else number
    reason = fields.get("Reason", "None")
    said = reason if reason != "None" else f"exit code {fields.get('ExitCode', '?')}"
    return Job(number, task, fields["JobState"], said)


def cancel(numbers: Sequence[str]) -> None:
    """Cancel jobs; those that have ended meanwhile are no error."""
    if numbers:
        call(["scancel", *numbers])
