"""One benchmark on one model: which answers are missing, and in which portions they are worked on."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparsekv.evaluation.engine.work import FULL_CACHE, Answer, Cell, ContextWork, Failure
from sparsekv.evaluation.matrix.cells import LOCKS, CellFolder, decisive, matrix_name
from sparsekv.evaluation.matrix.encode import Encoder
from sparsekv.fingerprint import fingerprint_of

MOST_CONTEXTS = 32  # of a portion: enough to fill a batch
PORTIONS = 8  # at least so many where there are as many contexts, for processes to share


@dataclass
class Job:
    """The cells of one benchmark on one model, in a folder of results.

    Parameters
    ----------
    out : Path
    encoder : Encoder
        Holds the benchmark.
    cells : dict of Cell to CellFolder

    Attributes
    ----------
    portions : list of lists of contexts, each a list of row numbers
        The same for every process; a process works on one at a time, under its lock.
    unavailable : dict of Cell to str
        Cells that cannot run here, and why.
    """

    out: Path
    encoder: Encoder
    cells: dict[Cell, CellFolder]
    portions: list[list[list[int]]] = field(init=False)
    unavailable: dict[Cell, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        contexts = self.encoder.contexts()
        size = max(1, min(MOST_CONTEXTS, len(contexts) // PORTIONS))
        self.portions = [contexts[start : start + size] for start in range(0, len(contexts), size)]

    @property
    def file_name(self) -> str:
        """Begins the names of files about the benchmark: the part of its cells' names that they share."""
        return matrix_name(next(iter(self.cells.values())).config)

    @property
    def name(self) -> str:
        """Of the benchmark, with its data_dir."""
        benchmark = self.encoder.benchmark
        return f"{benchmark.name} {benchmark.data_dir}" if benchmark.data_dir else benchmark.name

    @property
    def fingerprint(self) -> str:
        """Of all that decides the contexts and what their tokens are: rows, prompt, model, versions."""
        return fingerprint_of(decisive(self.cells[FULL_CACHE].config))

    def lock(self, portion: int) -> FileLock:
        """Held by the process that works on the portion."""
        full_cache = next(iter(self.cells.values()))
        return FileLock(self.out / LOCKS / f"{full_cache.path.name}.{portion}.lock")

    def refresh(self) -> None:
        """Learn what all processes have answered."""
        for folder in self.cells.values():
            folder.refresh()

    def missing(self, portion: int) -> int:
        """How many answers a portion lacks, as far as known."""
        rows = list(itertools.chain.from_iterable(self.portions[portion]))
        return sum(len(folder.missing(rows)) for folder in self._open().values())

    def works(self, portion: int) -> list[ContextWork]:
        """What is to be answered: the cells of a context that lack the same rows together."""
        works = []
        for rows in self.portions[portion]:
            alike: dict[frozenset[int], list[Cell]] = defaultdict(list)
            for cell, folder in self._open().items():
                alike[folder.missing(rows)].append(cell)
            works += [self.encoder.encode(sorted(rows), cells) for rows, cells in alike.items() if rows]
        return works

    def keep(self, batch: Sequence[Answer | Failure], **measured: Any) -> None:
        """Write down what a batch has given; `measured` goes with every answer."""
        answers: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
        for item in batch:
            folder = self.cells[item.cell]
            reason = item.reason if isinstance(item, Failure) else _not_finite(item, folder.config)
            if reason is not None:
                self.unavailable[item.cell] = reason
                folder.give_up(reason)
            else:
                record = {name: value for name, value in vars(item).items() if name != "cell"}
                answers[item.cell].append(record | measured)
        for cell, records in answers.items():
            self.cells[cell].append(records)

    def finish(self) -> None:
        """Turn every cell whose answers are all known into its files."""
        for folder in self.cells.values():
            if folder.complete:
                folder.finish(self.encoder.benchmark)

    def _open(self) -> dict[Cell, CellFolder]:
        return {cell: folder for cell, folder in self.cells.items() if cell not in self.unavailable}

    def state(self) -> str:
        """`13 cells: 5 done, 2 partly (31 of 120 rows), 6 to do`."""
        done = [folder for folder in self.cells.values() if folder.complete]
        rest = [folder for folder in self._open().values() if not folder.complete]
        partly = [folder for folder in rest if folder.answered]
        answered = sum(len(folder.answered) for folder in partly)
        expected = sum(len(folder.expected) for folder in partly)
        parts = {
            "done": len(done),
            f"partly ({answered} of {expected} rows)": len(partly),
            "to do": len(rest) - len(partly),
            "cannot run here": len(self.unavailable),
        }
        return f"{len(self.cells)} cells: " + ", ".join(f"{count} {what}" for what, count in parts.items() if count)


def _not_finite(answer: Answer, config: Mapping[str, Any]) -> str | None:
    """Why a likelihood is no score: a model that has diverged gives no numbers."""
    wrong = [f"{name} {value}" for name in ("nll", "kl") if not math.isfinite(value := getattr(answer, name) or 0.0)]
    if not wrong:
        return None
    ours = config["sparsekv"]
    who = f"adapter {ours['adapter']}" if ours["adapter"] else f"model {ours['model']}"
    return f"the output of {who} is not finite: row {answer.row} has {wrong[0]}"
