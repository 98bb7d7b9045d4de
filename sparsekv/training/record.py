"""What a folder of a training says of it: which options it was trained with, and whether it is finished."""

from dataclasses import asdict
from typing import Any

from sparsekv.training.config import TrainConfig

BEFORE = {"lambda_ce_context": 0.0}  # what runs did before an option existed, where that is not its default
MAY_CHANGE_ON_RESUME = {"resume", "save_steps", "logging_steps", "report_to", "output_dir", "device_map", "compile"}


def rows_of_a_step(record: dict[str, Any], processes: int) -> int:
    """Rows of an optimizer step of the run that has this record; an older version's may lack any of them."""
    batch_size, grad_accum = (
        record.get("config", {}).get(name, getattr(TrainConfig, name)) for name in ("batch_size", "grad_accum")
    )
    return batch_size * grad_accum * record.get("processes", processes)


def changed_steps(record: dict[str, Any], config: TrainConfig, processes: int) -> dict[str, tuple[Any, Any]]:
    """As `changed_options`, but for other micro-batches on other processes where a step has the same rows."""
    changed = changed_options(record.get("config", {}), config)
    if rows_of_a_step(record, processes) == config.batch_size * config.grad_accum * processes:
        changed = {name: values for name, values in changed.items() if name not in ("batch_size", "grad_accum")}
    return changed


def changed_options(recorded: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Option → (recorded value, value now), of those that decide what is trained.

    An option that the record of an older version lacks had its default, if `BEFORE` says nothing else.
    """
    before = asdict(TrainConfig(model=config.model, output_dir=config.output_dir)) | BEFORE | recorded
    free = MAY_CHANGE_ON_RESUME | ({"eval_steps"} if config.scheduler_mode != "adaptive" else set())
    return {
        name: (before[name], now) for name, now in asdict(config).items() if name not in free and before[name] != now
    }
