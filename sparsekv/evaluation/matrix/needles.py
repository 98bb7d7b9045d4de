"""Where in their contexts the answers of a benchmark stand, and how far the nearest anchor is: needles/….csv."""

import contextlib
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from sparsekv.anchors import AnchorConfig
from sparsekv.evaluation.benchmarks.scoring.rows import answers
from sparsekv.evaluation.comparison.results import FINGERPRINT, ROWS, benchmark_label
from sparsekv.evaluation.engine.work import FULL_CACHE
from sparsekv.evaluation.matrix.cells import LOCKS
from sparsekv.evaluation.matrix.encode import Encoder
from sparsekv.evaluation.matrix.jobs import Job
from sparsekv.files import write_text

NEEDLES = "needles"
MOST = 2  # occurrences of an answer that still make it a needle
COLUMNS = (
    *("benchmark", "data_dir", "model", ROWS, FINGERPRINT, "row", "task", "answer"),
    *("position", "context_tokens", "depth", "anchor_distance"),
)


class Located(NamedTuple):
    """A row's context, and where its answers stand in it.

    row : int
        Its number.
    ids : Long[C]
    places : dict
        Needle → the first and the last token of each place where it stands whole.
    """

    row: int
    ids: torch.Tensor
    places: dict[str, list[tuple[int, int]]]


def needle_file(job: Job) -> Path:
    """Where the needles of a job's benchmark are."""
    return job.out / NEEDLES / f"{job.file_name}.csv"


def write_needles(job: Job) -> None:
    """Write the needles of a benchmark, unless they are there, it has none, or another process is at it."""
    if not has_needles(job) or _is_there(job):
        return
    with contextlib.suppress(Timeout), FileLock(job.out / LOCKS / f"{job.file_name}.needles.lock").acquire(timeout=0):
        needles = [describe(job) | needle for needle in _needles(job.encoder)]
        if needles:
            file = io.StringIO()
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            writer.writeheader()
            writer.writerows(needles)
            write_text(needle_file(job), file.getvalue())
        else:
            needle_file(job).unlink(missing_ok=True)  # of something else


def has_needles(job: Job) -> bool:
    """Whether a benchmark may have some, and the tokenizer says where text stands."""
    benchmark = job.encoder.benchmark
    return benchmark.kind == "generate" and not benchmark.grows and bool(job.encoder.tokenizer.is_fast)


def describe(job: Job) -> dict[str, str]:
    """Whose the records are: their first columns."""
    config = job.cells[FULL_CACHE].config
    return {
        "benchmark": benchmark_label(config),
        "data_dir": str(config["data_dir"] or ""),
        "model": config["model"],
        ROWS: job.encoder.benchmark.fingerprint,
        FINGERPRINT: job.fingerprint,
    }


def _is_there(job: Job) -> bool:
    """Whether the file there was made from the same."""
    try:
        with needle_file(job).open(encoding="utf-8", newline="") as file:
            return next(csv.DictReader(file))[FINGERPRINT] == job.fingerprint
    except (FileNotFoundError, StopIteration, KeyError, ValueError, csv.Error):
        return False


def _needles(encoder: Encoder) -> Iterator[dict[str, Any]]:
    """A record for each needle; the first place counts."""
    selector = encoder.selector(AnchorConfig())
    for row, ids, places in locate(encoder):
        anchors = selector.classes(ids).nonzero()[:, 0]
        for answer, found in places.items():
            if found:
                first, last = found[0]
                yield {
                    "row": row,
                    "task": encoder.benchmark.rows[row]["task"],
                    "answer": answer,
                    "position": first,
                    "context_tokens": len(ids),
                    "depth": first / len(ids),
                    "anchor_distance": _distance(anchors, first, last),
                }


def locate(encoder: Encoder) -> Iterator[Located]:
    """Every row with answers that its context holds once or twice; a place that is cut off with its end is none."""
    for number, row in enumerate(encoder.benchmark.rows):
        patterns = {answer: re.compile(re.escape(answer.strip()), re.IGNORECASE) for answer in map(str, answers(row))}
        rare = {a: p for a, p in patterns.items() if a.strip() and 1 <= len(p.findall(row["context"])) <= MOST}
        if not rare:
            continue
        text = encoder.context_text(number)
        encoding = encoder.tokenizer(text, add_special_tokens=False, verbose=False)
        ids = torch.tensor(encoding["input_ids"])[: encoder.suite.max_context_length]
        start = max(0, text.find(row["context"].strip()))
        places: dict[str, list[tuple[int, int]]] = {}
        for answer, pattern in rare.items():
            ends = [(found.start(), found.end() - 1) for found in pattern.finditer(text, start)]
            tokens = [(encoding.char_to_token(first), encoding.char_to_token(last)) for first, last in ends]
            places[answer] = [(first, last) for first, last in tokens if None not in (first, last) and last < len(ids)]
        yield Located(number, ids, places)


def _distance(anchors: torch.Tensor, first: int, last: int) -> int | None:
    """Tokens from first … last to the nearest anchor, 0 if one is among them; None where there is none."""
    if not len(anchors):
        return None
    return int(torch.maximum(first - anchors, anchors - last).clamp(min=0).min())
