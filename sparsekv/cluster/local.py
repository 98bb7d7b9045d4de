"""The chain on this machine: one process a GPU, the rest in a queue; artefacts, logs and status as with Slurm."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

import psutil

from sparsekv.cluster.artefacts import state
from sparsekv.cluster.book import LOCAL, Book, Entry
from sparsekv.cluster.plan import Step, predecessors
from sparsekv.cluster.tail import last_lines
from sparsekv.errors import UserError
from sparsekv.signals import StopSignal

POLL = 0.2  # seconds
PROGRAM = (sys.executable, "-m", "sparsekv.cli")


@dataclass
class Task:
    """One process of a step, and while it runs the GPUs that it holds."""

    step: Step
    number: int
    size: int
    gpus: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    entry: Entry | None = None


def run(steps: Sequence[Step], book: Book) -> int:
    """Do what is due, in the order of its dependencies; returns the exit status.

    A first SIGINT or SIGTERM, or `sparsekv cancel`, lets the processes started here save and end; the same call
    continues. No other process is touched.
    """
    return Queue(steps, book, _gpus()).run()


class Queue:
    """The work that is left, and the processes that run.

    Parameters
    ----------
    steps : sequence of Step
        The whole chain.
    book : Book
    gpus : list of str
        Their ids as CUDA_VISIBLE_DEVICES has them; none: one process at a time, on the CPU.
    """

    def __init__(self, steps: Sequence[Step], book: Book, gpus: Sequence[str]) -> None:
        self.book = book
        self.by_name = {step.name: step for step in steps}
        self.places = deque(gpus or [""])
        self.open = {step.name for step in steps if step.due}
        self.failed: dict[str, str] = {}
        self.cancelled = False
        self.waiting = [task for step in steps if step.due for task in self._tasks(step)]
        self.running: list[Task] = []

    def _tasks(self, step: Step) -> list[Task]:
        """A matrix is shared by one process a GPU; an analysis spreads its model over several."""
        places = len(self.places)
        if step.phase.command == "eval":
            return [Task(step, number, 1) for number in range(places)]
        spread = step.phase.command == "analyze"
        return [Task(step, 0, min(step.phase.needs.gpus, places) if spread else 1)]

    def run(self) -> int:
        """Start, wait, until nothing is left or a signal comes."""
        with StopSignal() as stop:
            try:
                while (self.waiting or self.running) and stop.number is None and not self.cancelled:
                    self._start_what_can()
                    self._look()
                    time.sleep(POLL)
                self._stop()
            finally:
                self._kill()
        if stop.number is not None or self.cancelled:
            print("stopped; the same command continues", file=sys.stderr)
            return 128 + (stop.number or signal.SIGTERM)
        for name, reason in self.failed.items():
            print(f"{self.by_name[name].phase.label}: {reason}", file=sys.stderr)
        return 1 if self.failed else 0

    def _start_what_can(self) -> None:
        for task in list(self.waiting):
            before = predecessors(task.step, self.by_name)
            broken = [name for name in before if name in self.failed]
            if broken:
                self.failed.setdefault(task.step.name, f"not run: {', '.join(broken)} failed")
                self.waiting.remove(task)
            elif not self.open & {*before} and task.size <= len(self.places):
                self.waiting.remove(task)
                self._start(task)

    def _start(self, task: Task) -> None:
        phase = task.step.phase
        task.gpus = [self.places.popleft() for _ in range(task.size)]
        words = [*PROGRAM, phase.command, *phase.arguments]
        words += ["--resume", "true"] if phase.command == "train" else []
        environment = dict(os.environ)
        if any(task.gpus):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(task.gpus)
        log = self.book.logs / f"{phase.name}-local-{task.number}.log"
        with log.open("ab") as file:
            task.process = _spawn(words, environment, file)
        try:
            born = psutil.Process(task.process.pid).create_time()
        except psutil.Error:  # it has ended already
            born = time.time()
        task.entry = Entry(phase.name, str(task.process.pid), phase.fingerprint, LOCAL, str(log), born=born)
        self.running.append(task)
        self.book.add(task.entry)
        print(f"{phase.label}: process {task.process.pid}, {log}", flush=True)

    def _look(self) -> None:
        """What has ended gives its GPUs back; a step whose last process has ended is judged by its artefacts."""
        for task in list(self.running):
            assert task.process is not None
            assert task.entry is not None
            status = task.process.poll()
            if status is None:
                continue
            self.running.remove(task)
            self.places.extend(task.gpus)
            task.entry = replace(task.entry, status=status)
            self.book.add(task.entry)
            name = task.step.name
            if task.entry.stopped:
                self.cancelled = True
            elif status:
                said = "".join(f"\n    {line}" for line in last_lines(task.entry.log))
                self.failed.setdefault(name, f"failed with status {status}; the end of {task.entry.log}:{said}")
            elif name not in self.failed and not any(other.step.name == name for other in self._left()):
                self._judge(task.step)

    def _left(self) -> list[Task]:
        return [*self.running, *self.waiting]

    def _judge(self, step: Step) -> None:
        try:
            found = state(step.phase)
        except UserError as error:
            self.failed[step.name] = str(error)
            return
        if found.done:
            self.open.discard(step.name)
            print(f"{step.phase.label}: done ({found.note})", flush=True)
        else:
            self.failed[step.name] = f"ended well and left its work undone ({found.note})"

    def _stop(self) -> None:
        """Let what runs save and end."""
        for task in self.running:
            assert task.process is not None
            task.process.terminate()
        while self.running:
            self._look()
            time.sleep(POLL)

    def _kill(self) -> None:
        """After a second signal, or an error here."""
        for task in self.running:
            assert task.process is not None
            task.process.kill()


def _spawn(words: Sequence[str], environment: dict[str, str], log: IO[Any]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C reaches it through this process only, once."""
    return subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def _gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    import torch  # takes a second, which nothing else here needs

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    named = [name.strip() for name in visible.split(",") if name.strip()] if visible else list(map(str, range(count)))
    return named[:count]
