"""Where in their contexts the answers of a benchmark stand, and how far the nearest anchor is: needles/….csv."""

import contextlib
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.evaluation.benchmarks.scoring.rows import answers
from sparsekv.evaluation.comparison.results import benchmark_label
from sparsekv.evaluation.engine.work import FULL_CACHE
from sparsekv.evaluation.matrix.cells import LOCKS
from sparsekv.evaluation.matrix.encode import Encoder
from sparsekv.evaluation.matrix.jobs import Job
from sparsekv.files import write_text

NEEDLES = "needles"
MOST = 2  # occurrences of an answer that still make it a needle
COLUMNS = (
    *("benchmark", "data_dir", "model", "benchmark_fingerprint", "row", "task", "answer"),
    *("position", "context_tokens", "depth", "anchor_distance"),
)


def needle_file(job: Job) -> Path:
    """Where the needles of a job's benchmark are."""
    return job.out / NEEDLES / f"{job.file_name}.csv"


def write_needles(job: Job) -> None:
    """Write the needles of a benchmark, unless they are there, it has none, or another process is at it."""
    benchmark, tokenizer = job.encoder.benchmark, job.encoder.tokenizer
    if benchmark.kind != "generate" or benchmark.grows or not tokenizer.is_fast or _is_there(job):
        return
    with contextlib.suppress(Timeout), FileLock(job.out / LOCKS / f"{job.file_name}.needles.lock").acquire(timeout=0):
        config = job.cells[FULL_CACHE].config
        common = {
            "benchmark": benchmark_label(config),
            "data_dir": config["data_dir"] or "",
            "model": config["model"],
            "benchmark_fingerprint": benchmark.fingerprint,
        }
        needles = [common | needle for needle in _needles(job.encoder)]
        if needles:
            file = io.StringIO()
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            writer.writeheader()
            writer.writerows(needles)
            write_text(needle_file(job), file.getvalue())


def _is_there(job: Job) -> bool:
    """Whether the file there was made from the same rows."""
    try:
        with needle_file(job).open(encoding="utf-8", newline="") as file:
            return next(csv.DictReader(file))["benchmark_fingerprint"] == job.encoder.benchmark.fingerprint
    except (FileNotFoundError, StopIteration, KeyError, ValueError, csv.Error):
        return False


def _needles(encoder: Encoder) -> Iterator[dict[str, Any]]:
    """A record for each answer that its row's context holds once or twice; the first place counts."""
    selector = AnchorSelector(AnchorConfig(), encoder.tokenizer)
    for number, row in enumerate(encoder.benchmark.rows):
        patterns = {answer: re.compile(re.escape(answer.strip()), re.IGNORECASE) for answer in map(str, answers(row))}
        rare = {a: p for a, p in patterns.items() if a.strip() and 1 <= len(p.findall(row["context"])) <= MOST}
        if not rare:
            continue
        text = encoder.context_text(number)
        encoding = encoder.tokenizer(text, add_special_tokens=False)
        ids = torch.tensor(encoding["input_ids"])[: encoder.suite.max_context_length]
        anchors = selector.classes(ids).nonzero()[:, 0]
        start = max(0, text.find(row["context"].strip()))
        for answer, pattern in rare.items():
            found = pattern.search(text, start)
            if found is None:
                continue
            first, last = encoding.char_to_token(found.start()), encoding.char_to_token(found.end() - 1)
            if first is None or last is None or last >= len(ids):  # cut off with the end of the context
                continue
            yield {
                "row": number,
                "task": row["task"],
                "answer": answer,
                "position": first,
                "context_tokens": len(ids),
                "depth": first / len(ids),
                "anchor_distance": _distance(anchors, first, last),
            }


def _distance(anchors: torch.Tensor, first: int, last: int) -> int | None:
    """Tokens from first … last to the nearest anchor, 0 if one is among them; None where there is none."""
    if not len(anchors):
        return None
    return int(torch.maximum(first - anchors, anchors - last).clamp(min=0).min())
