"""Which checkpoint a run continues from, and whether it is whole."""

import json
import zipfile
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsekv.errors import UserError
from sparsekv.training.eit_trainer import SCHEDULER_STATE

STATES = (OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state*.pth", "*.safetensors")  # each process has its random state


def newest_checkpoint(out: Path) -> Path | None:
    """The folder of the highest step, if there is one.

    Raises
    ------
    UserError
        It is not whole. A kill never leaves one so, but copying may; and transformers goes on without some of its
        files, as another run.
    """
    steps = {p: p.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for p in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = [path for path, step in steps.items() if step.isdigit() and path.is_dir()]
    if not found:
        return None
    newest = max(found, key=lambda path: int(steps[path]))
    fault = _fault(newest)
    if fault:
        raise UserError(f"--resume: {newest}: {fault}; delete this folder to continue from the one before")
    return newest


def _fault(checkpoint: Path) -> str | None:
    for name in (TRAINER_STATE_NAME, SCHEDULER_STATE):
        if not _is_json(checkpoint / name):
            return f"{name} is missing or damaged"
    if any(checkpoint.glob(f"{FSDP_MODEL_NAME}*")):  # it has files of its own
        return None
    for name in STATES:
        files = [*checkpoint.glob(name)]
        if not files or not all(map(_is_whole, files)):
            return f"{name} is missing or damaged"
    return None


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _is_whole(file: Path) -> bool:
    """Whether its last byte is there, without reading it all."""
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)  # torch.save's kind, whose directory stands at the end
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
