"""What there is to do: which phases, in how many tasks, by which sbatch lines, after which others."""

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekv.cluster.artefacts import State, state
from sparsekv.cluster.book import Book, Entry
from sparsekv.cluster.estimate import Estimate, estimate
from sparsekv.cluster.phases import Phase
from sparsekv.cluster.pipeline import Pipeline
from sparsekv.cluster.site import Site
from sparsekv.errors import require

FILLED = 0.8  # of a task's time limit that the estimate may fill


@dataclass(frozen=True)
class Step:
    """A phase that was asked for.

    Attributes
    ----------
    phase : Phase
    state : State
    estimate : Estimate
        Of what is missing.
    tasks : int
        Of an evaluation: tasks that share its matrix. Of other phases 1.
    at_once : int
        How many of them may run at a time.
    log : str
        As sbatch takes it, with its own % codes.
    queued : Entry or None
        The job that does it already.
    """

    phase: Phase
    state: State
    estimate: Estimate
    tasks: int
    at_once: int
    log: str
    queued: Entry | None = None

    @property
    def due(self) -> bool:
        """Whether something is to be submitted."""
        return not self.state.done and self.queued is None

    @property
    def name(self) -> str:
        """Of its phase."""
        return self.phase.name

    def sbatch(self, site: Site, after: Sequence[str]) -> list[str]:
        """The words of its sbatch line; `after` are job ids."""
        needs = self.phase.needs
        kind = f"{site.gpu}:" if site.gpu else ""
        return [
            *("sbatch", "--parsable", "--kill-on-invalid-dep=yes"),
            f"--job-name=sparsekv-{self.phase.key}-{self.name}",
            f"--output={self.log}",
            *(f"--gres=gpu:{kind}{needs.gpus}", f"--cpus-per-task={needs.cpus}", f"--mem={needs.mem}"),
            f"--time={needs.time}",
            *([f"--array=0-{self.tasks - 1}%{self.at_once}"] if self.phase.command == "eval" else []),
            *site.options(),
            *(["-d", "afterok:" + ":".join(after)] if after else []),
            self.phase.script,
            *self.phase.arguments,
        ]

    def shown(self, site: Site, after: Sequence[str]) -> str:
        """The same as a line for a shell, which keeps the id for the lines that follow."""
        words = self.sbatch(site, ["AFTER"] if after else [])
        line = shlex.join(words).replace("afterok:AFTER", "afterok:" + ":".join(f"${name}" for name in after))
        environment = shlex.join(f"{name}={value}" for name, value in site.environment().items())
        return f"{self.name}=$({f'env {environment} ' if environment else ''}{line})"


def make_plan(
    pipeline: Pipeline,
    phases: Mapping[str, Phase],
    names: Sequence[str],
    book: Book,
    batch: int,
    gpus: int | None,
    most_tasks: int | None,
) -> list[Step]:
    """The steps of the phases named, in order; raises UserError when a folder holds the work of another configuration.

    Parameters
    ----------
    batch : int
        Tasks of a matrix at a time.
    gpus : int, optional
        Of a task of a matrix; default: as the experiment file says.
    most_tasks : int, optional
        Of a matrix, however long it takes.
    """
    rates, steps = pipeline.rates(), []
    for name in names:
        phase = phases[name]
        if gpus is not None and phase.command == "eval":
            phase = dataclasses.replace(phase, needs=dataclasses.replace(phase.needs, gpus=gpus))
        found = state(phase)
        cost = estimate(phase, found, pipeline.model(phase.key).billions * 1e9, rates)
        tasks = _tasks(phase, cost, most_tasks) if phase.command == "eval" else 1
        numbered = "%A_%a" if phase.command == "eval" else "%j"
        steps.append(Step(phase, found, cost, tasks, min(tasks, batch), str(book.logs / f"{name}-{numbered}.log")))
    return steps


def _tasks(phase: Phase, cost: Estimate, most: int | None) -> int:
    """As many as fill their time limits."""
    packed = math.ceil(cost.hours / (FILLED * phase.needs.hours * phase.needs.gpus)) if phase.needs.hours else 1
    tasks = phase.needs.tasks or max(1, packed)
    return tasks if most is None else min(tasks, most)


def predecessors(step: Step, steps: Mapping[str, Step]) -> list[str]:
    """Names of the unfinished steps that it waits for; those that are done are looked through."""
    found: dict[str, None] = {}
    for name in step.phase.after:
        if name in steps:
            before = [name] if not steps[name].state.done else predecessors(steps[name], steps)
            found |= dict.fromkeys(before)
    return list(found)


def check_scripts(steps: Sequence[Step]) -> None:
    """Raise UserError where a job's script is not here, or trains by another configuration than the one asked for."""
    for step in steps:
        script, config = step.phase.script, step.phase.arguments[1]  # of a training: --config FILE
        there = Path(script).is_file() and not script.startswith("-")
        require(there, f"{script}: no such file in {Path.cwd()}; run this in the folder of the repository")
        if step.phase.command == "train":
            own = re.search(r"train --config (\S+\.yaml) ", Path(script).read_text("utf-8"))
            says = f"{script}: trains by {own[1] if own else ''}, not by {config}; take scripts/slurm_phase2_train.sh"
            require(own is None or own[1] == config, says)
