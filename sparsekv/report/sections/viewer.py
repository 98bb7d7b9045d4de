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

from sparsekv.evaluation.comparison.levels import FULL_CACHE
from sparsekv.evaluation.comparison.results import FINISHED, SCORE, Results
from sparsekv.evaluation.matrix.views import KeptEntries, View, load_view
from sparsekv.report.collect import EvaluatedRun, Evidence
from sparsekv.tokens import TokenClass

BUDGET = 6 * 2**20  # characters of arrays in the page, over all views
LEFT_OUT = "left out to keep this page small; its file has it"


def build_viewer(evidence: Evidence) -> str:
    """JSON for the page's script element, or "" where no run has a view of an evicted cache.

    Every view gets an equal share of the page's room. Where a run has more cells than fit, those nearest to a
    compression ratio of one half are shown, and the rest is listed.

    Raises
    ------
    UserError
        A view is corrupt or of another schema version.
    """
    files = [(run, path) for run in evidence.runs.values() for path in run.views]
    views = [_view(run, path, load_view(path), BUDGET // len(files)) for run, path in files]
    shown = [view for view in views if view["cells"]]
    payload = {"classes": [each.name.lower() for each in TokenClass], "views": shown}
    return json.dumps(payload).replace("<", "\\u003c") if shown else ""  # a "<" could end the script element


def _view(run: EvaluatedRun, path: Path, view: View, room: int) -> dict[str, Any]:
    """One view as viewer.js takes it: arrays in base64, booleans as packed bits."""
    layers, kv_heads, _ = view.received.shape
    answers = _Answers(run.results, view)
    received = _base64(view.received)
    cells, left_out = _fitting(view.cells, room - len(received))
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
        "received": received,
        "cells": [
            {**_name(cell), "kept": _base64(np.packbits(cell.kept)), **answers.of(cell.press, cell.compression_ratio)}
            for cell in cells
        ],
        "not_shown": hidden,
    }


def _name(cell: KeptEntries) -> dict[str, Any]:
    return {"press": cell.press, "compression_ratio": cell.compression_ratio}


def _fitting(cells: Sequence[KeptEntries], room: int) -> tuple[list[KeptEntries], list[KeptEntries]]:
    """Which cells fit into so many characters (at least one), in their order, and the others."""
    size = max((-(-cell.kept.size // 6) for cell in cells), default=1)  # base64 has 6 bits a character
    near = sorted(cells, key=lambda cell: abs(cell.compression_ratio - 0.5))
    chosen = {id(cell) for cell in near[: max(1, room // size)]}
    return [cell for cell in cells if id(cell) in chosen], [cell for cell in cells if id(cell) not in chosen]


class _Answers:
    """What the run answered to the question of a view, read from its cells' predictions.csv."""

    def __init__(self, results: Results, view: View) -> None:
        cells, scores = results.cells, results.scores
        self.row = view.row
        self.cells = cells[(cells.benchmark == view.benchmark) & (cells.data_dir == view.data_dir)]
        first = scores[(scores.benchmark == view.benchmark) & (scores.task == view.task) & scores.headline]
        self.metric = str(first.metric.iloc[0]) if len(first) else ""

    def of(self, press: str, ratio: float) -> dict[str, Any]:
        """The first answer and its score; None where the cell is not finished."""
        found = self.cells[(self.cells.press == press) & (self.cells.compression_ratio == ratio)]
        for cell in found[found.reason == ""].itertuples():
            table = pd.read_csv(Path(cell.folder) / FINISHED[0], keep_default_na=False)
            line = table[(table.row == self.row) & (table.generation == 0)].iloc[0]
            return {"answer": str(line.predicted_answer), "score": float(line[f"{SCORE}{self.metric}"])}
        return {"answer": None, "score": None}


def _base64(array: NDArray[np.uint8]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
