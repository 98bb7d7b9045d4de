"""Which cells of a matrix are finished, begun or impossible: from their folders, without model or benchmark."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsekv.errors import UserError
from sparsekv.evaluation.comparison.cell_files import FINISHED, UNAVAILABLE
from sparsekv.evaluation.matrix.config import EvalConfig, Suite, split
from sparsekv.fingerprint import fingerprint

FILES = (".jsonl", ".parquet")  # a benchmark of the user's own
ELSEWHERE = {  # what differs in one of these is another cell in another folder, or judged by its rows
    *("dataset", "data_dir", "model", "query_aware", "context_length", "tasks", "num_samples"),
}
ASKED = (  # recorded in a cell as they are given
    *("num_samples", "context_length", "enable_thinking", "query_aware"),
    *("max_context_length", "temperature", "top_p", "top_k", "num_generations"),
)


@dataclass(frozen=True)
class CellState:
    """A cell of a matrix.

    Attributes
    ----------
    run, benchmark, press : str
    ratio : float
    state : str
        done, unavailable, begun or missing.
    note : str
        Why it cannot run, or how many answers are there.
    """

    run: str
    benchmark: str
    press: str
    ratio: float
    state: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.run}, {self.benchmark}, {self.press} {self.ratio:g}"


def find_cells(config: EvalConfig) -> Iterator[CellState]:
    """Every cell of the evaluation, in order.

    Raises
    ------
    UserError
        The folder of a cell holds another one, which the evaluation would refuse to replace.
    """
    for folder, run in config.folders().items():
        found = list(_recorded(folder))
        adapter = None if run.adapter is None or not found else fingerprint(Path(run.adapter))
        for suite in config.suites():
            by_cell = {}
            for path, recorded in found:
                cell = (recorded["press_name"], recorded["compression_ratio"])
                changed = _changed(config, run.model, adapter, suite, recorded)
                if cell in suite.cells() and not changed.keys() & ELSEWHERE:
                    _refuse(path, changed)
                    by_cell[cell] = path
            for press, ratio in suite.cells():
                state, note = _state(by_cell.get((press, ratio)))
                yield CellState(folder.name, suite_name(suite), press, ratio, state, note)


def suite_name(suite: Suite) -> str:
    """`ruler:4096`."""
    return suite.name if suite.data_dir is None else f"{suite.name}:{suite.data_dir}"


def _recorded(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in sorted(folder.glob("*__*/config.yaml")):
        try:
            content = yaml.load(file.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            yield file.parent, {**content, **content["sparsekv"]}
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: corrupt ({reason}); delete this folder to do the cell again") from error


def _changed(
    config: EvalConfig, model: str, adapter: str | None, suite: Suite, recorded: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What a cell was asked otherwise than this evaluation asks, of an adapter by its fingerprint: (then, now)."""
    name = Path(suite.name).stem if suite.name.endswith(FILES) else suite.name
    wanted = {
        "dataset": name,
        "model": model,
        "adapter_fingerprint": adapter,
        "seed": config.seed,
        "max_new_tokens": suite.max_new_tokens,
    }
    wanted |= {key: asdict(suite)[key] for key in ASKED} | {"tasks": split(suite.tasks) or None}
    if config.dtype != "auto":
        wanted["dtype"] = config.dtype
    part = str(recorded.get("data_dir"))  # of a benchmark made to measure it begins with the length
    known = None if suite.data_dir is None else Path(str(suite.data_dir)).stem
    if not (known is None or part == str(suite.data_dir) or part.endswith(f"-{known}")):
        wanted["data_dir"] = suite.data_dir
    return {key: (recorded.get(key), now) for key, now in wanted.items() if recorded.get(key) != now}


def _refuse(cell: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    for key, (was, now) in changed.items():
        how = "another adapter" if key == "adapter_fingerprint" else f"{key} {was!r}, now {now!r}"
        raise UserError(f"{cell.parent}: was made with {how}; name other results, or delete this folder ({cell.name})")


def _state(folder: Path | None) -> tuple[str, str]:
    if folder is None:
        return "missing", ""
    if all((folder / name).is_file() for name in FINISHED):
        return "done", ""
    if (folder / UNAVAILABLE).is_file():
        return "unavailable", _reason(folder / UNAVAILABLE)
    answers = sum(file.read_bytes().count(b"\n") for file in folder.glob("journal-*.jsonl"))
    return "begun", f"{answers} answers" if answers else ""


def _reason(file: Path) -> str:
    try:
        return str(yaml.safe_load(file.read_text("utf-8"))["reason"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return f"{file}: corrupt; delete it"
