"""How far a press that goes by position alone can come by copying what it keeps: bounds/….csv."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from kvpress import ScorerPress, StreamingLLMPress

from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.benchmarks.scoring.rows import answers
from sparsekv.evaluation.comparison.results import BOUND_COLUMNS, BOUNDS, FINGERPRINT, read_bounds
from sparsekv.evaluation.engine.work import FULL_CACHE, Cell
from sparsekv.evaluation.matrix.cells import LOCKS
from sparsekv.evaluation.matrix.encode import Encoder
from sparsekv.evaluation.matrix.jobs import Job
from sparsekv.evaluation.matrix.needles import Located, describe, has_needles, locate
from sparsekv.files import write_text
from sparsekv.presses import AnchorPress, make_press


def write_bounds(job: Job) -> None:
    """Write the bounds of a benchmark's positional cells, beside those that are there, unless it has no needles.

    A bound is the score that a row's answers get which stand in the context where the press keeps all of their tokens;
    only tasks all of whose answers are needles have one.
    """
    presses = {cell: press for cell in job.cells if (press := _positional(cell, job.encoder)) is not None}
    if not presses or not has_needles(job):
        return
    file = job.out / BOUNDS / f"{job.file_name}.csv"
    with contextlib.suppress(Timeout), FileLock(job.out / LOCKS / f"{job.file_name}.bounds.lock").acquire(timeout=0):
        known = _known(file, job)
        have = {(row["press"], row["compression_ratio"]) for row in known}
        missing = {cell: press for cell, press in presses.items() if (cell.press, cell.ratio) not in have}
        found = [describe(job) | bound for bound in _bounds(job.encoder, missing)] if missing else []
        if found:
            table = pd.DataFrame(known + found, columns=BOUND_COLUMNS)
            write_text(file, table.sort_values(["task", "press", "compression_ratio"]).to_csv(index=False))
        elif not known:
            file.unlink(missing_ok=True)  # of something else


def _known(file: Path, job: Job) -> list[dict[str, Any]]:
    """What is there and was made from the same."""
    rows = read_bounds(file).to_dict("records") if file.exists() else []
    return [row for row in rows if row[FINGERPRINT] == job.fingerprint]


def _positional(cell: Cell, encoder: Encoder) -> ScorerPress | None:
    """The cell's press, if it goes by position and token alone."""
    press = None if cell == FULL_CACHE else make_press(cell.press, cell.ratio, encoder.tokenizer)
    if isinstance(press, AnchorPress):
        press.selector = encoder.selector(press.anchors)
    return press if isinstance(press, AnchorPress | StreamingLLMPress) else None


def _bounds(encoder: Encoder, presses: dict[Cell, ScorerPress]) -> Iterator[dict[str, Any]]:
    """A record for each cell and task."""
    rows = encoder.benchmark.rows
    scores: dict[tuple[str, Cell], list[float]] = defaultdict(list)
    for found in locate(encoder):
        row = rows[found.row]
        if set(found.places) == set(map(str, answers(row))):
            for cell, press in presses.items():
                with contextlib.suppress(AssertionError):  # kvpress's, of a context no longer than the press's sinks
                    scores[row["task"], cell].append(_score(encoder.benchmark, found, kept(press, found.ids)))
    for (task, cell), values in scores.items():
        if len(values) == sum(row["task"] == task for row in rows):
            bound = sum(values) / len(values)
            names = {"task": task, "press": cell.press, "compression_ratio": cell.ratio}
            yield names | {"n": len(values), "bound": bound}


def kept(press: ScorerPress, ids: torch.Tensor) -> torch.Tensor:
    """Bool[C]: which tokens of a context (Long[C]) the press keeps, by the press's own `compress`."""
    if isinstance(press, AnchorPress):
        press.input_ids = ids[None]
    positions = torch.arange(len(ids), dtype=torch.float64)[None, None, :, None]  # keys of one head: where they are
    keys, _ = press.compress(SimpleNamespace(head_dim=1), None, positions, positions, None, {})
    return torch.zeros(len(ids), dtype=torch.bool).index_fill(0, keys.flatten().long(), True)


def _score(benchmark: Benchmark, found: Located, keep: torch.Tensor) -> float:
    """What the benchmark gives for saying every answer that is kept in one of its places."""
    said = [answer for answer, places in found.places.items() if _survives(places, keep)]
    scores = benchmark.score({**benchmark.rows[found.row], "predicted_answer": " ".join(said)})
    return next(iter(scores.values()))


def _survives(places: Sequence[tuple[int, int]], keep: torch.Tensor) -> bool:
    return any(bool(keep[first : last + 1].all()) for first, last in places)
