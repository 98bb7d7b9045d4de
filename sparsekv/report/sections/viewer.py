"""What the page's token viewer shows: for each run and benchmark one context, and what every press keeps of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparsekv.errors import require
from sparsekv.evaluation.comparison.cell_files import FINISHED
from sparsekv.evaluation.comparison.levels import FULL_CACHE
from sparsekv.evaluation.comparison.results import SCORE, Results
from sparsekv.evaluation.matrix.views import KeptEntries, View, load_view
from sparsekv.report.collect import EvaluatedRun, Evidence
from sparsekv.token_classes import TokenClass

BUDGET = 6 * 2**20  # characters of arrays in the page, over all views
LEFT_OUT = "left out to keep this page small; its file has it"


def build_viewer(evidence: Evidence) -> tuple[str, list[Path]]:
    """JSON for the page's script element, "" where it shows nothing, and the views for which there is no room.

    Benchmark by benchmark, views are shown as long as one cell of each fits; what room is left then they share evenly.
    Where a run has more cells than fit, those nearest to a compression ratio of one half are shown, and the rest is
    listed.

    Raises
    ------
    UserError
        A view is corrupt, of another schema version, or of other rows than the cells.
    """
    files = [(run, path) for run in evidence.runs.values() for path in run.views]
    chosen: list[tuple[EvaluatedRun, Path, View]] = []
    left_out, room = [], BUDGET
    for run, path in sorted(files, key=lambda file: file[1].name):  # the runs of a benchmark together
        view = load_view(path)
        if not view.cells or (view.benchmark, view.data_dir) not in run.benchmarks():
            continue  # it may be another run's of the same folder
        if _least(view) <= room:
            chosen.append((run, path, view))
            room -= _least(view)
        else:
            left_out.append(path)
    shown = [_view(*each, room // len(chosen)) for each in chosen]
    payload = {"classes": [each.name.lower() for each in TokenClass], "views": shown}
    text = json.dumps(payload).replace("<", "\\u003c")  # a "<" could end the script element
    return text if shown else "", left_out


def _least(view: View) -> int:
    """Characters of a view that shows one cell."""
    return _characters(view.received.size) + _cell_size(view)


def _cell_size(view: View) -> int:
    return _characters(-(-view.received.size // 8))  # a bit an entry


def _characters(count: int) -> int:
    """How many base64 needs for so many bytes."""
    return 4 * -(-count // 3)


def _view(run: EvaluatedRun, path: Path, view: View, room: int) -> dict[str, Any]:
    """One view as viewer.js takes it: arrays in base64, booleans as packed bits; `room` is for more cells than one."""
    layers, kv_heads, _ = view.received.shape
    answers = _Answers(run.results, view, path)
    cells, left_out = _fitting(view.cells, 1 + room // _cell_size(view))
    hidden = [vars(cell) for cell in view.not_shown]
    hidden += [{**_name(cell), "reason": LEFT_OUT} for cell in left_out]
    return {
        "run": run.role,
        "place": " ".join(filter(None, (view.benchmark, view.data_dir))),
        "source": str(path),
        "question": view.question,
        "expected": view.answer,
        "metric": answers.metric,
        "full": answers.of(*FULL_CACHE),
        "layers": layers,
        "kv_heads": kv_heads,
        "tokens": view.tokens,
        "classes": _base64(view.classes),
        "anchors": _base64(np.packbits(view.anchors)),
        "received": _base64(view.received),
        "cells": [
            {**_name(cell), "kept": _base64(np.packbits(cell.kept)), **answers.of(cell.press, cell.compression_ratio)}
            for cell in cells
        ],
        "not_shown": hidden,
    }


def _name(cell: KeptEntries) -> dict[str, Any]:
    return {"press": cell.press, "compression_ratio": cell.compression_ratio}


def _fitting(cells: Sequence[KeptEntries], count: int) -> tuple[list[KeptEntries], list[KeptEntries]]:
    """So many cells, in their order, and the others."""
    near = sorted(cells, key=lambda cell: abs(cell.compression_ratio - 0.5))
    chosen = {id(cell) for cell in near[:count]}
    return [cell for cell in cells if id(cell) in chosen], [cell for cell in cells if id(cell) not in chosen]


class _Answers:
    """What the run answered to the question of a view, read from its cells' predictions.csv."""

    def __init__(self, results: Results, view: View, path: Path) -> None:
        cells, scores = results.cells, results.scores
        self.path, self.row, self.task = path, view.row, view.task
        self.cells = cells[(cells.benchmark == view.benchmark) & (cells.data_dir == view.data_dir)]
        first = scores[(scores.benchmark == view.benchmark) & (scores.task == view.task) & scores.headline]
        self.metric = str(first.metric.iloc[0]) if len(first) else ""

    def of(self, press: str, ratio: float) -> dict[str, Any]:
        """The first answer and its score; None where the cell is not finished."""
        found = self.cells[(self.cells.press == press) & (self.cells.compression_ratio == ratio)]
        for cell in found[found.reason == ""].itertuples():
            text = {"task": str, "predicted_answer": str}  # an answer 0042 is not 42
            table = pd.read_csv(Path(cell.folder) / FINISHED[0], dtype=text, keep_default_na=False)
            asked = table[(table.row == self.row) & (table.generation == 0) & (table.task == self.task)]
            require(
                len(asked) == 1,
                f"{self.path}: of other rows than {cell.folder}; delete it and run the same `sparsekv eval` again",
            )
            line = asked.iloc[0]
            return {"answer": line.predicted_answer, "score": float(line[f"{SCORE}{self.metric}"])}
        return {"answer": None, "score": None}


def _base64(array: NDArray[np.uint8]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
