"""`sparsekv submit`: says what would be done and what it costs, asks, and does it."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsekv.cluster import local, slurm
from sparsekv.cluster.book import SLURM, Book, Entry
from sparsekv.cluster.config import SubmitConfig
from sparsekv.cluster.estimate import assumptions, rounded
from sparsekv.cluster.phases import Phase, make_phases
from sparsekv.cluster.pipeline import Pipeline, load_pipeline
from sparsekv.cluster.plan import Step, check_scripts, make_plan, predecessors
from sparsekv.cluster.site import Site, load_site
from sparsekv.errors import UserError, require
from sparsekv.files import FINAL, TEXT_SUFFIXES
from sparsekv.signals import StopSignal
from sparsekv.training.config import TrainConfig


def submit(config: SubmitConfig) -> int:
    """Submit what is missing; returns the exit status.

    Raises
    ------
    UserError
        Whatever cannot work, before anything is submitted; or Slurm's own words.
    """
    pipeline = load_pipeline(Path(config.pipeline))
    key, names = _asked(config, pipeline)
    phases = make_phases(pipeline, key)
    names = names or list(phases)
    if names == ["trained"]:
        _check_adapters(phases, config)
    book = Book(Path(pipeline.model(key).results))
    site = load_site(Path(config.cluster)) if config.executor == SLURM else Site()
    batch = config.batch or pipeline.batch
    most = None if config.target == "pipeline" else batch
    queued, ending = _queued(names, book)  # before the artefacts: what ends meanwhile is found done
    steps = make_plan(pipeline, phases, names, book, batch, config.gpus, most)
    steps = [replace(step, queued=queued.get(step.name)) for step in steps]
    _check_queued(steps, ending, config)
    if config.executor == SLURM:
        check_scripts(steps)
    _show(steps, site, pipeline, config)
    due = [step for step in steps if step.due]
    missing = _missing_inputs(steps)
    if not due or config.dry_run:
        for line in missing:
            print(f"not yet to be submitted: {line}")
        return 0
    require(not missing, "; ".join(missing))
    if config.executor == SLURM:
        slurm.check_available()
    _confirm(due, config)
    with book.held():
        require(_queued(names, book) == (queued, ending), f"{book.file}: has just changed; try again")
        return _submit_chain(steps, site, book) if config.executor == SLURM else local.run(steps, book)


def _asked(config: SubmitConfig, pipeline: Pipeline) -> tuple[str, list[str]]:
    """The model's key and the phases; none means all."""
    if config.target == "pipeline":
        return str(config.model), []
    key = config.target.removesuffix("_trained")
    known = ", ".join(["pipeline", *pipeline.models, *(f"{each}_trained" for each in pipeline.models)])
    require(key in pipeline.models, f"submit {config.target}: unknown; known are {known}")
    return key, ["baseline" if key == config.target else "trained"]


def _check_adapters(phases: dict[str, Phase], config: SubmitConfig) -> None:
    """Phase 3 alone needs what phase 2 leaves."""
    words = ["sparsekv", "submit", "pipeline", "--model", phases["trained"].key]
    for option in ("pipeline", "cluster", "executor"):
        value = getattr(config, option)
        words += [f"--{option}", value] if value != getattr(SubmitConfig, option) else []
    for phase in (phases[name] for name in ("control", "train") if name in phases):
        there = (phase.out / FINAL).is_dir()
        require(there, f"submit {config.target}: no adapter in {phase.out / FINAL} yet; make it: {shlex.join(words)}")


def _missing_inputs(steps: Sequence[Step]) -> list[str]:
    """A line for each text or adapter that a training lacks: else it is missed when the phases before are done."""
    lines = []
    made = {str(step.phase.out / FINAL) for step in steps}
    for step in (step for step in steps if step.due):
        config = step.phase.config
        if not isinstance(config, TrainConfig):
            continue
        for name in [config.data] if isinstance(config.data, str) else config.data:
            if name.endswith(TEXT_SUFFIXES) and not Path(name).expanduser().exists():
                lines.append(f"{step.phase.label}: --data {name}: no such file; make it first")
        adapter = config.teacher_adapter
        if adapter is not None and adapter not in made and not Path(adapter).expanduser().exists():
            lines.append(f"{step.phase.label}: --teacher_adapter {adapter}: no such folder; make it first")
    return lines


def _queued(names: Sequence[str], book: Book) -> tuple[dict[str, Entry], set[str]]:
    """Phase → the entry of a job that waits or runs now, and the ids of those that are just ending.

    Raises
    ------
    UserError
        A job waits for what has failed.
    """
    entries = [entry for entry in book.entries() if entry.phase in names]
    jobs = slurm.queued(entry.number for entry in entries if entry.executor == SLURM)
    for job in jobs:
        way_out = f"scancel {job.number}, then submit again"
        require(
            job.reason != slurm.NEVER, f"job {job.number} waits for a job that failed, and will never run; {way_out}"
        )
    alive = {job.number for job in jobs}
    ending = alive - {job.number for job in jobs if job.state != "COMPLETING"}
    found = (entry for entry in entries if entry.running or (entry.executor == SLURM and entry.number in alive))
    return {entry.phase: entry for entry in found}, ending


def _check_queued(steps: Sequence[Step], ending: set[str], config: SubmitConfig) -> None:
    """Raise UserError when a job that waits or runs has other options, or no other can be made to wait for it."""
    due = any(step.due for step in steps)
    for step in steps:
        if step.queued is None or step.state.done:
            continue
        job, way_out = f"{step.phase.label}: {step.queued.title}", f"sparsekv cancel --model {step.phase.key}"
        same = step.queued.fingerprint == step.phase.fingerprint
        require(same, f"{job} does it with other options; to change them: {way_out}")
        require(step.queued.number not in ending, f"{job} is about to end; try again in a minute")
        chained = step.queued.executor == SLURM == config.executor
        require(chained or not due, f"{job} is at work on it; submit the rest when it has ended, or stop it: {way_out}")


def _show(steps: Sequence[Step], site: Site, pipeline: Pipeline, config: SubmitConfig) -> None:
    """Each phase: done, queued, or what it will be."""
    by_name = {step.name: step for step in steps}
    for step in steps:
        if not step.due:
            job = f"queued already, {step.queued.title}" if step.queued else "done"
            print(f"{step.phase.label}: {'done' if step.state.done else job} ({step.state.note})")
            continue
        each = f"{step.tasks} {'task' if step.tasks == 1 else 'tasks'} × {step.phase.needs.gpus} GPU"
        cost = f"about {rounded(step.estimate.gpu_hours)} GPU-hours: {step.estimate.work}"
        print(f"{step.phase.label}: {each}, {cost} ({step.state.note})")
        if config.executor == SLURM:
            print(f"  script: {step.phase.script}")
            print(f"  {step.shown(site, predecessors(step, by_name))}")
        else:
            print(f"  {shlex.join(['sparsekv', step.phase.command, *step.phase.arguments])}")
    if due := [step for step in steps if step.due]:
        print(f"in all about {rounded(sum(step.estimate.gpu_hours for step in due))} GPU-hours")
        for line in assumptions(pipeline.rates(), [step.phase for step in due]):
            print(f"  {line}")
    else:
        print("nothing to submit")


def _confirm(due: Sequence[Step], config: SubmitConfig) -> None:
    """Ask, unless --yes; anything but yes ends with one line."""
    if config.yes:
        return
    require(sys.stdin.isatty(), "submit: there is no terminal to ask on; give --yes, or --dry-run to look only")
    try:
        answer = input(f"Submit {len(due)} {'job' if len(due) == 1 else 'jobs'}? [y/N] ")
    except EOFError:  # Ctrl-D
        answer = ""
        print()
    require(answer.strip().lower() in ("y", "yes"), "submit: nothing was submitted")


def _submit_chain(steps: Sequence[Step], site: Site, book: Book) -> int:
    """Submit what is due, each after what it needs; when Slurm refuses one, or a signal comes, none of them stays."""
    by_name = {step.name: step for step in steps}
    numbers = {step.name: step.queued.number for step in steps if step.queued is not None}
    new: list[str] = []
    environment = {**os.environ, **site.environment()}
    with StopSignal() as stop:
        for step in (step for step in steps if step.due):
            after = [numbers[name] for name in predecessors(step, by_name)]
            try:
                new.append(slurm.submit(step.sbatch(site, after), environment))
                log = step.log.replace("%A", new[-1]).replace("%j", new[-1]).replace("%a", "*")
                book.add(Entry(step.name, new[-1], step.phase.fingerprint, SLURM, log))
            except UserError as error:
                raise UserError(f"{step.phase.label}: {error}{_undo(new)}") from error
            except KeyboardInterrupt:  # again, while sbatch is waited for
                print(f"stopped{_undo(new)}", file=sys.stderr)
                raise
            if stop.number is not None:
                print(f"stopped{_undo(new)}", file=sys.stderr)
                return 128 + stop.number
            numbers[step.name] = new[-1]
            print(f"{step.phase.label}: job {new[-1]}")
    print(f"sparsekv status --model {steps[0].phase.key} shows how far they are")
    return 0


def _undo(numbers: Sequence[str]) -> str:
    """Cancel the jobs; what to say of it."""
    if not numbers:
        return "; nothing was submitted"
    try:
        slurm.cancel(numbers)
    except UserError as error:
        return f"; job {', '.join(numbers)} could not be cancelled again: {error}"
    return f"; cancelled again: job {', '.join(numbers)}"
