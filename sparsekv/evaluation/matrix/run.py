"""`sparsekv eval`: does what is missing of the matrix, alone or beside other processes."""

import gc
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sparsekv.adapters import load_merged
from sparsekv.evaluation.comparison.compare import write_summary
from sparsekv.evaluation.engine.engine import Engine
from sparsekv.evaluation.engine.sampling import Sampling
from sparsekv.evaluation.matrix.bounds import write_bounds
from sparsekv.evaluation.matrix.cells import LOCKS
from sparsekv.evaluation.matrix.config import EvalConfig, launched
from sparsekv.evaluation.matrix.inputs import Run, device, prepare
from sparsekv.evaluation.matrix.jobs import Job
from sparsekv.evaluation.matrix.needles import write_needles
from sparsekv.evaluation.matrix.view_maker import keep_view
from sparsekv.files import writing
from sparsekv.models import load_model
from sparsekv.progress import CountProgress, speaks
from sparsekv.signals import StopSignal

logger = logging.getLogger(__name__)

POLL = 0.2  # seconds between looks at what other processes hold
GIB = 2**30

Item = tuple[Job, int]  # a job and one of its portions


def evaluate(config: EvalConfig) -> int | None:
    """Do what is missing, and write the summary of every run.

    Returns
    -------
    int or None
        The signal that stopped it after the batch in flight; the same call continues.

    Raises
    ------
    UserError
        See `prepare`; nothing is written then. Or a folder that can no longer be written.
    """
    runs = prepare(config)
    _say_state(runs)
    shares = [_share(run, config) for run in runs]
    total = sum(job.missing(portion) for share in shares for job, portion in share)
    with StopSignal() as stop, CountProgress("answers", total) as progress:
        for run, share in zip(runs, shares, strict=True):
            worker = Worker(config, run, stop, progress)
            if any(job.missing(portion) for job, portion in share):
                worker.loaded()  # a model that cannot be loaded leaves nothing behind
            _begin(run)
            worker.work(share)
            if stop.number is not None:
                return stop.number
            _end(run)
        if config.runs:
            _summarize(Path(config.out))
    _say_state(runs)
    return None


def _share(run: Run, config: EvalConfig) -> list[Item]:
    """What this process may do, from its own place on where a launcher started several: none is left with nothing."""
    index, count = config.share()
    items = [(job, portion) for job in run.jobs for portion in range(len(job.portions))][index::count]
    rank, size = launched()
    first = len(items) * rank // size
    return items[first:] + items[:first]


def _begin(run: Run) -> None:
    with writing(run.out, "--out"):
        (run.out / LOCKS).mkdir(parents=True, exist_ok=True)
        for job in run.jobs:
            for folder in job.cells.values():
                if not folder.finished:
                    folder.begin()


def _end(run: Run) -> None:
    """Finish cells that were complete before, and write needles, bounds and the summary."""
    with writing(run.out, "--out"):
        for job in run.jobs:
            job.refresh()
            job.finish()
            write_needles(job)
            write_bounds(job)
    _summarize(run.out)


def _summarize(out: Path) -> None:
    """Write the summary of a folder of cells, or of several such folders: trained runs are compared with their base."""
    with writing(out, "--out"):
        (out / LOCKS).mkdir(exist_ok=True)
        with FileLock(out / LOCKS / "summary.lock"):
            write_summary(out)


def _say_state(runs: Sequence[Run]) -> None:
    """What is done and what is not: once, not by every process of a launcher."""
    if not speaks():
        return
    for run in runs:
        for job in run.jobs:
            logger.info("%s, %s: %s", run.out, job.name, job.state())
            for cell, reason in job.unavailable.items():
                logger.info("  %s: %s", cell, reason)


class Worker:
    """Works on one model; it is loaded where an answer, or a view, is missing.

    Parameters
    ----------
    config : EvalConfig
    run : Run
    stop : StopSignal
        Looked at after every batch.
    progress : CountProgress
    """

    def __init__(self, config: EvalConfig, run: Run, stop: StopSignal, progress: CountProgress) -> None:
        self.config, self.run, self.stop, self.progress = config, run, stop, progress
        self._model: Any = None
        self._engines: dict[int, Engine] = {}

    def work(self, items: Sequence[Item]) -> None:
        """Answer what is missing of these portions, until a signal comes."""
        for job, portion in claim(items, self.stop):
            missing = job.missing(portion)
            job.refresh()
            self.progress.advance(missing - job.missing(portion))  # what other processes have done
            works = job.works(portion)
            for batch in self._engine(job).run(works) if works else ():
                before = job.missing(portion)
                with writing(self.run.out, "--out"):
                    job.keep(batch, **self._measure())
                self.progress.advance(before - job.missing(portion))
                if self.stop.number is not None:
                    return
            with writing(self.run.out, "--out"):
                job.finish()
        self._keep_views()
        self._model = None
        gc.collect()
        torch.cuda.empty_cache()

    def _keep_views(self) -> None:
        """Keep a context of each benchmark as the presses see it, for the report."""
        self._engines = {}
        for job in self.run.jobs:
            if self.stop.number is None:
                keep_view(job, self.config.view_tokens, self.loaded, self.config.seed)

    def _engine(self, job: Job) -> Engine:
        model = self.loaded()
        if id(job) not in self._engines:
            suite, budget = job.encoder.suite, self.config.memory_budget_gib
            sampling = Sampling(suite.temperature, suite.top_p, suite.top_k, suite.num_generations, self.config.seed)
            budget_bytes = None if budget is None else int(budget * GIB)
            self._engines[id(job)] = Engine(model, self.run.tokenizer, budget_bytes, sampling)
        return self._engines[id(job)]

    def loaded(self) -> Any:
        """The model, with its adapter in it."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> Any:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        name, adapter = self.run.model.model, self.run.model.adapter
        model: Any = load_model(name, self.config.dtype, device(self.config), self.config.trust_remote_code)
        if adapter is not None:
            model = load_merged(model, adapter)
        return model.eval()

    def _measure(self) -> dict[str, Any]:
        """The process's own device and the peak of its memory."""
        where = self._model.device
        if where.type == "cuda":
            name, peak = torch.cuda.get_device_name(where), torch.cuda.max_memory_allocated(where)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            name, peak = where.type, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"device": name, "peak_memory_bytes": peak}


def claim(items: Sequence[Item], stop: StopSignal) -> Iterator[Item]:
    """Each portion, under its lock as long as the caller works on it; those that other processes hold come last."""
    waiting = deque(items)
    refused = 0  # in a row
    while waiting and stop.number is None:
        job, portion = waiting.popleft()
        try:
            with job.lock(portion).acquire(timeout=0):
                refused = 0
                yield job, portion
        except Timeout:
            waiting.append((job, portion))
            refused += 1
            if refused >= len(waiting):
                time.sleep(POLL)
