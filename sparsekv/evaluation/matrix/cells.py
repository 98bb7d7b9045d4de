"""One cell of the matrix as a folder, in the layout of kvpress's own evaluation.

    config.yaml        what was asked; written first, and a cell that was asked otherwise is refused
    journal-*.jsonl    predictions as they come, until the cell is finished
    predictions.csv, metrics.json, profile.json    a finished cell, written in this order
    unavailable.json   instead of these, why the press cannot run here, or the model gives no numbers

Whatever a second process could do at the same moment happens under the cell's lock.
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock

from sparsekv.errors import UserError, require
from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.comparison.cell_files import FINISHED, UNAVAILABLE
from sparsekv.evaluation.matrix.journal import Journal
from sparsekv.evaluation.matrix.predictions import predicted_rows, predictions_csv, profile
from sparsekv.files import write_json, write_text

CONFIG = "config.yaml"
LOCKS = ".locks"
LONGEST_NAME = 240  # bytes of a folder's name: systems allow 255, and the name of its lock is longer
FREE = {"device", "output_dir", "log_level", "press_init_command"}  # may differ between runs of one cell
# What only leads to something that is compared itself: another path to the same adapter is no other cell.
JUDGED_BY = {
    "adapter": "adapter_fingerprint",
    "tasks": "benchmark_fingerprint",
    "num_samples": "benchmark_fingerprint",
    "context_length": "benchmark_fingerprint",
}


class CellFolder:
    """The files of a cell.

    Parameters
    ----------
    out : Path
        The folder of results, one level up.
    config : mapping
        The content of config.yaml.
    num_rows, num_generations : int
        Every row is answered so many times.

    Attributes
    ----------
    answered : set of (row, generation)
        As far as `refresh` has seen.
    """

    def __init__(self, out: Path, config: Mapping[str, Any], num_rows: int, num_generations: int = 1) -> None:
        self.config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(config), sort_keys=False))
        self.path = out / cell_name(self.config)
        self._num_generations = num_generations
        self.expected = set(itertools.product(range(num_rows), range(num_generations)))
        self.answered: set[tuple[int, int]] = set()
        self.lock = FileLock(out / LOCKS / f"{self.path.name}.lock")
        self._journal = Journal(self.path)

    @property
    def finished(self) -> bool:
        """Whether the predictions, metrics and profile are there."""
        return all((self.path / name).is_file() for name in FINISHED)

    @property
    def complete(self) -> bool:
        """Whether every answer is known, finished or not."""
        return self.answered == self.expected

    def check(self) -> None:
        """Look at what is there, write nothing.

        Raises
        ------
        UserError
            The cell was run with another configuration, or its folder is corrupt.
        """
        journals = self._journal.files()  # first: a process that finishes the cell removes them last
        try:
            self._check_config()
            done = [name for name in FINISHED if (self.path / name).is_file()]
            if len(done) == len(FINISHED):
                self._check_finished()
            elif done and not journals:
                raise ValueError(f"{done[0]} without {next(name for name in FINISHED if name not in done)}")
        except (ValueError, KeyError, TypeError, OSError, yaml.YAMLError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise UserError(f"{self.path}: corrupt ({reason}); delete this folder to do the cell again") from error
        self.refresh()

    def _check_config(self) -> None:
        there = [path for path in self.path.glob("*") if not path.name.startswith(".")]  # then the file: it comes first
        if not (self.path / CONFIG).is_file():
            if there or (self.path.exists() and not self.path.is_dir()):
                raise ValueError(f"no {CONFIG}")
            return
        before = yaml.safe_load((self.path / CONFIG).read_text("utf-8"))
        changed = differences({**before, **before["sparsekv"]}, {**self.config, **self.config["sparsekv"]})
        if changed:
            key, was, now = changed[0]
            answers = any((self.path / name).is_file() for name in FINISHED) or self._journal.files()
            state = "its predictions are not reused" if answers else "it holds no answer yet"
            raise UserError(
                f"{self.path}: was run with {key} {was!r}, now {now!r}; {state}: "
                "name another --out, or delete this folder"
            )

    def _check_finished(self) -> None:
        for name in FINISHED[1:]:
            json.loads((self.path / name).read_text("utf-8"))
        predictions = self.path / FINISHED[0]
        table = pd.read_csv(predictions, usecols=["row", "generation"])
        rows = list(zip(table.row.tolist(), table.generation.tolist(), strict=True))
        if not predictions.read_bytes().endswith(b"\n"):
            raise ValueError(f"{FINISHED[0]} breaks off")
        if sorted(rows) != sorted(self.expected):
            wrong = min(set(rows) ^ self.expected, default=rows[0])
            raise ValueError(f"{FINISHED[0]} has the wrong rows: row {wrong[0]}, generation {wrong[1]}")

    def begin(self) -> None:
        """Write config.yaml, unless another process just has; raises like `check`."""
        with self.lock:
            self.check()
            if not (self.path / CONFIG).is_file():
                write_text(self.path / CONFIG, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))

    def refresh(self) -> None:
        """Learn what all processes have answered."""
        self.answered |= {(record["row"], record["generation"]) for record in self._journal.news()} & self.expected
        if self.finished:  # asked last: its journals may have gone while they were read
            self.answered = set(self.expected)

    def missing(self, rows: Iterable[int]) -> frozenset[int]:
        """Which of the rows lack an answer."""
        generations = range(self._num_generations)
        return frozenset(row for row in rows if any((row, each) not in self.answered for each in generations))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep answers, each a mapping with row, generation and what `predictions` needs; known ones are left out."""
        new = [record for record in records if (record["row"], record["generation"]) not in self.answered]
        self._journal.append(new)
        self.answered |= {(record["row"], record["generation"]) for record in new}

    def finish(self, benchmark: Benchmark) -> None:
        """Turn the journals of a complete cell into its files, unless another process just has."""
        if self.finished and not self._journal.files():
            return
        with self.lock:
            if not self.finished:
                answers = {(record["row"], record["generation"]): record for record in Journal(self.path).news()}
                records = [answers[key] for key in sorted(self.expected)]
                rows = predicted_rows(benchmark, records, self.config["compression_ratio"])
                write_text(self.path / FINISHED[0], predictions_csv(benchmark, rows))
                write_json(self.path / FINISHED[1], benchmark.metrics(rows))
                write_json(self.path / FINISHED[2], profile(records))
            half_written = self.path.glob(".*")  # by a process that was killed
            for leftover in (*half_written, self.path / UNAVAILABLE, *self._journal.files()):
                leftover.unlink(missing_ok=True)

    def give_up(self, reason: str) -> None:
        """Say why the cell cannot be finished here."""
        with self.lock:
            if not self.finished:
                write_json(self.path / UNAVAILABLE, {"reason": reason})


def cell_name(config: Mapping[str, Any]) -> str:
    """`{dataset}__{data_dir}__{model}__{press}__{ratio}`, as kvpress names it; a ratio of more decimals keeps them."""
    ratio = config["compression_ratio"]
    parts = (
        config["dataset"],
        config["data_dir"],
        config["model"],
        config["press_name"].replace(":", "_"),
        f"{ratio:.2f}" if round(ratio, 2) == ratio else str(ratio),
        "query_aware" if config["query_aware"] else None,
    )
    return join_names(parts)


def matrix_name(config: Mapping[str, Any]) -> str:
    """The part of a cell's name that all presses on one benchmark and model share."""
    query_aware = "query_aware" if config["query_aware"] else None
    return join_names((config["dataset"], config["data_dir"], config["model"], query_aware))


def join_names(parts: Iterable[object]) -> str:
    """`a__b__c`, fit for the name of a file or folder; without what is empty."""
    return "__".join(str(part).replace("/", "--") for part in parts if part)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of what differs and matters; what people set comes before fingerprints."""
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    decisive = [key for key in changed if key not in FREE and JUDGED_BY.get(key, key) in changed]
    ordered = sorted(decisive, key=lambda key: ("fingerprint" in key, key))
    return [(key, before.get(key), now.get(key)) for key in ordered if key != "sparsekv"]


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of a cell's config that `differences` goes by, in one mapping: the same in all runs of the cell."""
    every = {**config, **config["sparsekv"]}
    return {key: value for key, value in every.items() if key not in {*FREE, *JUDGED_BY, "sparsekv"}}


def check_names(cells: Iterable[CellFolder]) -> None:
    """Raise UserError when two cells would share a folder, or a folder's name is too long."""
    seen: dict[Path, CellFolder] = {}
    for cell in cells:
        size = len(os.fsencode(cell.path.name))
        require(
            size <= LONGEST_NAME,
            f"--model {cell.config['model']}: a cell's folder is named after it, the benchmark and the press, which "
            f"makes {size} bytes; at most {LONGEST_NAME} can be: give shorter ones",
        )
        other = seen.setdefault(cell.path, cell)
        if other is not cell:
            changed = [f"{key} {one!r} and {two!r}" for key, one, two in differences(other.config, cell.config)]
            apart = changed[0] if changed else "the same benchmark twice"
            raise UserError(f"{cell.path}: two cells would share this folder: {apart}; give them an --out each")
