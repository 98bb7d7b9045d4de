"""What is done, read from what the commands leave: never from Slurm's history, never by running a model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekv.analysis.config import AnalysisConfig
from sparsekv.analysis.names import ANALYSIS
from sparsekv.cluster.cells import CellState, find_cells
from sparsekv.cluster.phases import Phase
from sparsekv.errors import UserError
from sparsekv.evaluation.matrix.config import EvalConfig
from sparsekv.files import FINAL, RUN_CONFIG
from sparsekv.training.config import TrainConfig
from sparsekv.training.record import changed_steps


@dataclass(frozen=True)
class State:
    """How far a phase is.

    Attributes
    ----------
    done : bool
        Its artefacts are there, made with this configuration.
    note : str
        What is there, in a few words.
    cells : tuple of CellState
        Of an evaluation.
    """

    done: bool
    note: str
    cells: tuple[CellState, ...] = ()


def state(phase: Phase) -> State:
    """How far a phase is.

    Raises
    ------
    UserError
        Its folder holds the work of another configuration, which the phase's command would refuse to continue.
    """
    if isinstance(phase.config, EvalConfig):
        return _evaluated(phase.config)
    if isinstance(phase.config, TrainConfig):
        return _trained(phase.config, phase.needs.gpus)
    return _analyzed(phase.config)


def _analyzed(config: AnalysisConfig) -> State:
    out = Path(config.output_dir)
    found = _read(out / ANALYSIS)
    if found is None:
        measured = len(list(out.glob("samples/*.safetensors")))
        return State(False, f"{measured} of {config.num_samples} rows measured" if measured else "nothing yet")
    wanted: dict[str, Any] = {"dtype": config.dtype, "anchors": asdict(config.anchors)}
    options = ("model", "adapter", "data", "data_subset", "num_samples", "max_len", "seed")
    wanted |= {name: getattr(config, name) for name in options}
    _refuse_other(out, {name: (found.get(name), now) for name, now in wanted.items() if found.get(name) != now})
    return State(True, str(out / ANALYSIS))


def _trained(config: TrainConfig, processes: int) -> State:
    out = Path(config.output_dir)
    final = (out / FINAL).is_dir()
    record = _read((out / FINAL if final else out) / RUN_CONFIG)
    if record is None:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: is not empty and holds no run of `sparsekv train`; name another folder")
        return State(False, "nothing yet")
    _refuse_other(out, changed_steps(record, config, processes))
    if final:
        return State(True, str(out / FINAL))
    steps = [int(path.name[11:]) for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    return State(False, f"checkpoint of step {max(steps)}" if steps else "begun, no checkpoint yet")


def _evaluated(config: EvalConfig) -> State:
    cells = tuple(find_cells(config))
    counts = {kind: sum(cell.state == kind for cell in cells) for kind in ("done", "unavailable")}
    note = f"{counts['done']} of {len(cells)} cells done"
    if counts["unavailable"]:
        note += f", {counts['unavailable']} cannot run"
    return State(sum(counts.values()) == len(cells), note, cells)


def _refuse_other(out: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    """Raise UserError where what is in a folder was made otherwise: option → (value then, value now)."""
    for name, (before, now) in changed.items():
        was = f"--{name} {before!r}, now {now!r}"
        raise UserError(f"{out}: was made with {was}; name another folder, or delete this one")


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None where there is none; raises UserError when it is corrupt."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: corrupt ({error}); delete {path.parent} to do it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: corrupt; delete {path.parent} to do it again")
    return found
