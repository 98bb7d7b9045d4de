"""What became of each needle: an answer that stands in its context, found or not under each press."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparsekv.errors import UserError, require
from sparsekv.evaluation.benchmarks.scoring.string_match import match_all
from sparsekv.evaluation.comparison.cell_files import FINISHED
from sparsekv.evaluation.comparison.results import NO_PRESS, ROWS
from sparsekv.report.collect import EvaluatedRun


def read_needles(run: EvaluatedRun, file: Path) -> pd.DataFrame:
    """What became of each needle of a benchmark under each press.

    Returns
    -------
    DataFrame
        One row a needle (row, answer), cell and generation: the columns of the file, press, compression_ratio,
        generation and died (1.0 or 0.0; NaN where the full cache does not find it either). Empty where the run has no
        such cells.

    Raises
    ------
    UserError
        The file is corrupt, cannot be read, or is of other rows than the cells.
    """
    again = f"delete {file} and run the same `sparsekv eval` again"
    text = dict.fromkeys(("benchmark", "data_dir", "model", ROWS, "task", "answer"), str)
    numbers = {"row": int, "depth": float, "anchor_distance": float}
    try:
        needles = pd.read_csv(file, dtype=text, keep_default_na=False, na_values={"anchor_distance": [""]})
        if missing := [name for name in (*text, *numbers) if name not in needles]:
            raise ValueError(f"no column {', '.join(missing)}")
        needles = needles.astype(numbers)
        benchmark, data_dir, model, made_from = needles.iloc[0][["benchmark", "data_dir", "model", ROWS]]
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror or error})") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{file}: corrupt ({' '.join(str(error).split())}); {again}") from error
    cells = run.results.cells
    cells = cells[(cells.benchmark == benchmark) & (cells.data_dir == data_dir) & (cells.reason == "")]
    cells = cells[cells.model == model]
    for cell in cells.itertuples():
        require(cell.settings.get(ROWS) == made_from, f"{file}: of other rows than {cell.folder}; {again}")
    answered = [_answered(needles, cell) for cell in cells.itertuples()]
    if not answered:
        return needles.iloc[:0]
    table = pd.concat(answered, ignore_index=True)
    key = ["row", "answer", "generation"]
    full = table[table.press == NO_PRESS].set_index(key).found
    known = table.join(full.rename("found_full"), on=key)
    known["died"] = np.where(known.found_full == 1, 1 - known.found, np.nan)
    return known[known.press != NO_PRESS].drop(columns=["found", "found_full"])


def _answered(needles: pd.DataFrame, cell: Any) -> pd.DataFrame:
    """The needles with each generation of a cell, and whether it found them."""
    predictions = pd.read_csv(
        cell.folder / FINISHED[0],
        usecols=["row", "generation", "predicted_answer"],
        dtype={"predicted_answer": str},
        keep_default_na=False,
    )
    table = needles.merge(predictions, on="row").assign(press=cell.press, compression_ratio=cell.compression_ratio)
    table["found"] = [match_all(row.predicted_answer, [row.answer.strip()]) for row in table.itertuples()]
    return table.drop(columns="predicted_answer")
