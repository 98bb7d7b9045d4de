"""`sparsekv status` and `sparsekv cancel`: artefacts first, then what Slurm says of the jobs that were submitted."""

import glob
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekv.cluster import slurm
from sparsekv.cluster.artefacts import State, state
from sparsekv.cluster.book import LOCAL, SLURM, Book, Entry
from sparsekv.cluster.cells import CellState
from sparsekv.cluster.config import StatusConfig
from sparsekv.cluster.phases import Phase, make_phases
from sparsekv.cluster.pipeline import Pipeline, load_pipeline
from sparsekv.cluster.tail import last_lines
from sparsekv.errors import UserError

LOGS = 2  # at most so many logs of a phase are quoted


@dataclass(frozen=True)
class Progress:
    """What became of a phase's newest job.

    Attributes
    ----------
    word : str
        running, pending, failed, unknown without an answer from Slurm, or "" where nothing was submitted.
    note : str
    logs : tuple of str
        That say more.
    """

    word: str = ""
    note: str = ""
    logs: tuple[str, ...] = ()


def status(config: StatusConfig) -> None:
    """Print every phase of the models asked for."""
    pipeline = load_pipeline(Path(config.pipeline))
    keys = _keys(pipeline, config)
    entries = {key: Book(Path(pipeline.model(key).results)).entries() for key in keys}
    jobs = _ask(itertools.chain(*entries.values()))
    for key in keys:
        print(f"{key}: {pipeline.model(key).model}")
        for phase in make_phases(pipeline, key).values():
            _show_phase(phase, [entry for entry in entries[key] if entry.phase == phase.name], jobs)
    if not keys:
        first = next(iter(pipeline.models))
        print(f"nothing was submitted yet; sparsekv submit pipeline --model {first} --dry-run shows what would be")


def _keys(pipeline: Pipeline, config: StatusConfig) -> list[str]:
    """The model asked for, or all that have results."""
    if config.model is not None:
        pipeline.model(config.model)
        return [config.model]
    return [key for key in pipeline.models if Path(pipeline.model(key).results).is_dir()]


def _ask(entries: Iterable[Entry]) -> list[slurm.Job] | None:
    """What squeue says of the jobs; None where it gives no answer."""
    try:
        return slurm.queued(entry.number for entry in entries if entry.executor == SLURM)
    except UserError as error:
        print(f"what waits or runs is not known: {error}")
        return None


def _show_phase(phase: Phase, entries: Sequence[Entry], jobs: Sequence[slurm.Job] | None) -> None:
    try:
        found = state(phase)
    except UserError as error:
        print(f"  {phase.label}: refused: {error}")
    else:
        _show(phase, found, Progress() if found.done or not entries else _progress(entries, jobs))


def _progress(entries: Sequence[Entry], jobs: Sequence[slurm.Job] | None) -> Progress:
    """Of the newest job of a phase, or of the newest local processes."""
    newest = entries[-1]
    if newest.executor == LOCAL:
        return _local_progress(entries)
    if jobs is None:
        return Progress("unknown", newest.title)
    mine = [job for job in jobs if job.number == newest.number]
    if mine:
        counts = Counter(job.state for job in mine)
        reasons = sorted({job.reason for job in mine if job.state == "PENDING"} - {"None"})
        word = "running" if "RUNNING" in counts or "COMPLETING" in counts else "pending"
        note = ", ".join(f"{count} {name}" for name, count in counts.items())
        return Progress(
            word, f"{newest.title}: {note}" + (f" ({'; '.join(reasons)})" if reasons else ""), _logs(newest)
        )
    ended = slurm.history(newest.number)
    bad = [job for job in ended if job.failed]
    if not bad and any(job.state.startswith("COMPLET") for job in ended):
        return Progress("failed", f"{newest.title} ended and left its work undone", _logs(newest))
    said = "; ".join(map(str, bad[:3])) or "ended; Slurm forgot how"
    return Progress("failed", f"{newest.title}: {said}", _logs(newest, [job.task for job in bad]))


def _local_progress(entries: Sequence[Entry]) -> Progress:
    newest = entries[-1]
    mine = [entry for entry in entries if entry.executor == LOCAL and entry.fingerprint == newest.fingerprint]
    if running := [entry for entry in mine if entry.running]:
        numbers = ", ".join(entry.number for entry in running)
        return Progress("running", f"process {numbers}", tuple(entry.log for entry in running))
    if newest.status is None:
        return Progress("failed", f"{newest.title} on {newest.host} ended without a word", (newest.log,))
    what = "was stopped" if newest.stopped else f"ended with status {newest.status}"
    return Progress("pending" if newest.stopped else "failed", f"{newest.title} {what}", (newest.log,))


def _logs(entry: Entry, tasks: Sequence[str] = ()) -> tuple[str, ...]:
    """Logs of a job, newest last; those of the tasks named, if any."""
    found = glob.glob(f"{glob.escape(entry.log[:-5])}*.log") if entry.log.endswith("*.log") else [entry.log]
    named = [log for log in found if any(Path(log).stem.endswith(f"-{task}") for task in tasks)]
    return tuple(sorted(named or found, key=lambda log: os.path.getmtime(log) if os.path.exists(log) else 0))


def _show(phase: Phase, found: State, progress: Progress) -> None:
    word = "done" if found.done else progress.word or "not submitted"
    note = "; ".join(part for part in (found.note, progress.note) if part)
    print(f"  {phase.label}: {word} ({note})")
    if found.cells and not found.done:
        _show_cells(found.cells, progress)
    for cell in found.cells:
        if cell.state == "unavailable":
            print(f"    failed: {cell}: {cell.note}")
    if progress.word in ("failed", "running"):
        for log in progress.logs[-LOGS:]:
            lines = last_lines(log)
            print(f"    {log}:" if lines else f"    {log}: no such file, or empty")
            for line in lines:
                print(f"      {line}")


def _show_cells(cells: Sequence[CellState], progress: Progress) -> None:
    """A line a run and benchmark."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    names = {"done": "done", "unavailable": "failed", "missing": "pending"}
    names["begun"] = "running" if progress.word == "running" else "pending"
    for cell in cells:
        groups.setdefault((cell.run, cell.benchmark), Counter())[names[cell.state]] += 1
    why = {"failed": "the job failed", "": "not submitted"}.get(progress.word, progress.note)
    for (run, benchmark), counts in groups.items():
        parts = [f"{counts[name]} {name}" for name in ("done", "running", "failed", "pending") if counts[name]]
        reason = f" ({why})" if counts["pending"] else ""
        print(f"    {run}, {benchmark}: {', '.join(parts)}{reason}")


def cancel(config: StatusConfig) -> None:
    """Cancel the jobs and stop the processes that wait or run; what they have done stays, and is continued."""
    pipeline = load_pipeline(Path(config.pipeline))
    found = False
    for key in _keys(pipeline, config):
        entries = Book(Path(pipeline.model(key).results)).entries()
        alive = {job.number for job in slurm.queued(entry.number for entry in entries if entry.executor == SLURM)}
        slurm.cancel(sorted(alive, key=int))
        for entry in entries:
            if entry.executor == SLURM and entry.number in alive:
                print(f"{key}, {entry.phase}: {entry.title} cancelled")
            elif entry.running:
                os.kill(int(entry.number), signal.SIGTERM)
                print(f"{key}, {entry.phase}: {entry.title} stopped")
            else:
                continue
            found = True
    if not found:
        print("nothing waits or runs")
