"""Cell folders, read back into one table of scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from sparsekv.errors import UserError, gist, require
from sparsekv.evaluation.comparison.cell_files import FINISHED

NO_PRESS = "no_press"  # the press name of the full-cache cell
CONTEXT = "context"  # the column of predictions.csv with the number of a row's context
SCORE = "score:"  # what the names of score columns in predictions.csv begin with
CELL = ["benchmark", "data_dir", "press", "compression_ratio"]
RUN = ["model", "adapter"]
COLUMNS = [*RUN, *CELL, "task", "row", "context", "generation", "training", "metric", "score", "headline"]
BOUNDS = "bounds"  # folder beside the cells: how far presses that go by position alone can come
ROWS = "benchmark_fingerprint"  # of a benchmark's rows, in their order
FINGERPRINT = "fingerprint"  # of all that decides what a file beside the cells says of a benchmark
BOUND_COLUMNS = [
    *("benchmark", "data_dir", "model", ROWS, FINGERPRINT),
    *("task", "press", "compression_ratio", "n", "bound"),
]
# What may differ between cells that are compared; all else in a cell's `sparsekv` section may not.
FREE = {"model", "model_fingerprint", "adapter", "adapter_fingerprint", "dtype", "benchmark"}
FREE |= {"kvpress_version", "transformers_version"}
CHOOSES_ROWS = {"tasks", "num_samples", "context_length", "seed"}  # may differ where the rows are the same


@dataclass(frozen=True)
class Results:
    """Every cell below a folder.

    Parameters
    ----------
    folder : Path
        Where they were read.
    cells : DataFrame
        One row a cell: `RUN` and `CELL` columns, folder, seed, commit, lower_is_better (frozenset of metrics), settings
        (what decides its answers), reason (why it has no scores, or "").
    scores : DataFrame
        One row a cell, question, generation and metric: `COLUMNS`; context is its number in the benchmark (NaN in cells
        that were written before it was), headline whether this is the task's first metric, training the number of the
        run among several of a role.
    bounds : DataFrame
        One row a positional cell and task: `BOUND_COLUMNS`.
    """

    folder: Path
    cells: pd.DataFrame
    scores: pd.DataFrame
    bounds: pd.DataFrame

    def runs(self) -> list[tuple[str, str]]:
        """Every (model, adapter) here; the adapter of an untrained model is ""."""
        return sorted(set(self.cells[RUN].itertuples(index=False, name=None)))

    def run(self, model: str, adapter: str) -> Results:
        """The cells of one run."""
        cells, scores = (
            table[(table.model == model) & (table.adapter == adapter)] for table in (self.cells, self.scores)
        )
        return Results(self.folder, cells, scores, self.bounds[self.bounds.model == model])


def load_results(folder: str | Path) -> Results:
    """Read every cell folder in `folder`, or, where there is none, in the folders below it.

    Raises
    ------
    UserError
        There is no cell; a cell is corrupt or cannot be read (the message names its file and what is wrong); two
        folders hold the same cell; cells of one benchmark hold other rows.
    """
    folder = Path(folder)
    found = _cell_folders(folder, "*") or _cell_folders(folder, "**/*")
    require(bool(found), f"{folder}: no cell folder of `sparsekv eval` here")
    loaded = [_load_cell(path) for path in found]
    cells = pd.DataFrame([cell for cell, _ in loaded])
    same = cells[cells.duplicated([*RUN, *CELL], keep=False)]
    require(
        same.empty,
        f"{folder}: the same cell in two folders, {' and '.join(map(str, same.folder[:2]))}; name that of one run",
    )
    full = [table for _, table in loaded if not table.empty]
    scores = pd.concat(full, ignore_index=True) if full else pd.DataFrame(columns=COLUMNS)
    for _, group in cells.groupby(RUN):
        check_paired(group)
    return Results(folder, cells, scores, _load_bounds(cells))


def check_results(folder: Path, pattern: str = "*") -> None:
    """Raise as `load_results` does where `folder` holds cells that it cannot read; there need be none."""
    if _cell_folders(folder, pattern):
        load_results(folder)


def _cell_folders(folder: Path, pattern: str) -> list[Path]:
    files = (path for name in ("config.yaml", *FINISHED) for path in folder.glob(f"{pattern}__*/{name}"))
    return sorted({path.parent for path in files})


def check_paired(cells: pd.DataFrame) -> None:
    """Raise UserError unless all cells of each benchmark asked the same questions in the same way."""
    for _, group in cells.groupby(["benchmark", "data_dir"]):
        first = group.iloc[0]
        for cell in group.itertuples():
            one, two = first.settings, cell.settings
            same = FREE | CHOOSES_ROWS if one.get(ROWS) == two.get(ROWS) else FREE
            other = {key for key in (one.keys() | two.keys()) - same if one.get(key) != two.get(key)}
            if other:
                key = min(other, key=lambda key: (key == ROWS, key))  # what people set says more than what follows
                raise UserError(
                    f"{cell.folder}: {key} is {two.get(key)}, but {one.get(key)} in {first.folder}; only cells that "
                    "answer the same questions in the same way can be compared: evaluate both alike"
                )


def _load_cell(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """One cell's row of `Results.cells`, and its rows of `Results.scores`."""
    cell: dict[str, Any] = {"folder": folder, "commit": "", "reason": ""}
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        foreign = isinstance(config, dict) and "press_name" in config and "sparsekv" not in config
        require(not foreign, f"{file}: not written by `sparsekv eval` (it has no section sparsekv); leave it out")
        cell |= _describe(config)
        if all((folder / name).exists() for name in FINISHED):
            file = folder / "profile.json"
            cell["commit"] = json.loads(file.read_text(encoding="utf-8")).get("commit") or ""
            file = folder / "predictions.csv"
            table = _load_scores(file).assign(**{key: cell[key] for key in [*RUN, *CELL]})
            cell["reason"] = "" if len(table) else "has no scores: the benchmark's answers are not public"
            return cell, table
        file = folder / "unavailable.json"
        cell["reason"] = str(json.loads(file.read_text(encoding="utf-8"))["reason"])
    except FileNotFoundError:
        require(file.name != "config.yaml", f"{folder}: corrupt, it has no config.yaml; delete it and evaluate again")
        cell["reason"] = "not finished"
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else gist(error)
        raise UserError(f"{file}: corrupt ({reason}); delete this folder and evaluate again") from error
    return cell, pd.DataFrame(columns=COLUMNS)


def _load_bounds(cells: pd.DataFrame) -> pd.DataFrame:
    """What the folders of these cells hold about the same rows."""
    rows = {(cell.benchmark, cell.data_dir, cell.settings.get(ROWS)) for cell in cells.itertuples()}
    tables = [pd.DataFrame(columns=BOUND_COLUMNS)]
    for file in sorted({file for folder in cells.folder for file in folder.parent.glob(f"{BOUNDS}/*.csv")}):
        try:
            table = read_bounds(file)
        except OSError as error:
            raise UserError(f"{file}: it cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            again = f"delete {file} and run the same `sparsekv eval` again"
            raise UserError(f"{file}: corrupt ({' '.join(str(error).split())}); {again}") from error
        if set(table[["benchmark", "data_dir", ROWS]].itertuples(index=False, name=None)) <= rows:
            tables.append(table)
    return pd.concat(tables[1:], ignore_index=True) if tables[1:] else tables[0]


def read_bounds(file: Path) -> pd.DataFrame:
    """One file of bounds; raises ValueError where it is none."""
    table = pd.read_csv(file, dtype=dict.fromkeys(BOUND_COLUMNS[:7], str), keep_default_na=False)
    if FINGERPRINT not in table:  # an older file: it is read, and made anew by the next evaluation
        table[FINGERPRINT] = ""
    if missing := [name for name in BOUND_COLUMNS if name not in table]:
        raise ValueError(f"no column {', '.join(missing)}")
    return table[BOUND_COLUMNS].astype({"compression_ratio": float, "n": int, "bound": float})


def _describe(config: dict[str, Any]) -> dict[str, Any]:
    """A cell's row of `Results.cells`, as far as config.yaml tells."""
    settings = config["sparsekv"]
    return {
        "benchmark": benchmark_label(config),
        "data_dir": str(config.get("data_dir") or ""),
        "model": str(settings["model"]),
        "adapter": str(settings.get("adapter") or ""),
        "press": str(config["press_name"]),
        "compression_ratio": float(config["compression_ratio"]),
        "seed": settings["seed"],
        "lower_is_better": frozenset(settings.get("lower_is_better") or ()),
        "settings": {**settings, "max_new_tokens": config.get("max_new_tokens")},
    }


def benchmark_label(config: dict[str, Any]) -> str:
    """The benchmark's name; one whose presses are shown the question is another, with a full cache of its own."""
    seen = " (query-aware)" if config["sparsekv"].get("query_aware") else ""
    return f"{config['dataset']}{seen}"


def _load_scores(file: Path) -> pd.DataFrame:
    """Long table of the scores in a predictions.csv; empty where there is no score column.

    Raises
    ------
    ValueError
        Something is missing, double or not a number.
    """
    wanted = ["row", "generation", "task"]
    names = {"task": str}  # as they are: a task may be called NA, which is a missing value elsewhere
    used = {*wanted, CONTEXT}
    table = pd.read_csv(file, usecols=lambda name: name in used or name.startswith(SCORE), converters=names)
    missing = [name for name in wanted if name not in table]
    metrics = [name for name in table if name.startswith(SCORE)]
    if missing or table.empty:
        raise ValueError(f"no column {', '.join(missing)}" if missing else "no row")
    table[metrics] = table[metrics].astype(float)
    table[CONTEXT] = table[CONTEXT].astype(int) if CONTEXT in table else np.nan
    if metrics:
        _refuse(table, ~np.isfinite(table[metrics]).any(axis=1) | np.isinf(table[metrics]).any(axis=1), "has no score")
    _refuse(table, table.duplicated(["row", "generation"]), "is there twice")
    long = table.melt([*wanted, CONTEXT], metrics, "metric", "score").dropna(subset="score")
    long["metric"], long["training"] = long.metric.str.removeprefix(SCORE), 0
    long["headline"] = long.metric == long.groupby("task").metric.transform("first")
    return long


def _refuse(table: pd.DataFrame, wrong: pd.Series, what: str) -> None:
    if wrong.any():
        raise ValueError(f"row {table.row[wrong].iloc[0]} {what}")
