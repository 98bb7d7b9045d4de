"""The files of a training run: which folder may be used, what is recorded, what is left at the end."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME
from transformers import PreTrainedConfig

from sparsekv.errors import UserError, require
from sparsekv.files import FINAL, RUN_CONFIG, check_writable, held, readable, write_json, write_text, writing
from sparsekv.fingerprint import fingerprint
from sparsekv.models import model_fingerprint
from sparsekv.training.checkpoints import newest_checkpoint
from sparsekv.training.config import TrainConfig
from sparsekv.training.eit_trainer import SCHEDULER_STATE, STAGING, EITTrainer
from sparsekv.training.model_card import model_card
from sparsekv.training.record import changed_steps, rows_of_a_step
from sparsekv.version import commit, versions


def usable_checkpoint(out: Path, config: TrainConfig, processes: int = 1) -> Path | None:
    """The checkpoint to resume from, if any; raise UserError when the folder cannot be used. Writes nothing."""
    check_writable(out, "--output_dir")
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        return None  # a kill at the very first write leaves a file with a dot
    if not config.resume:
        raise UserError(f"--output_dir {out}: is not empty; give --resume to continue its run, or another folder")
    return _find_checkpoint(out, config, processes)


def is_finished(out: Path) -> bool:
    """Whether nothing is left to train."""
    return (out / FINAL / RUN_CONFIG).is_file()


def _find_checkpoint(out: Path, config: TrainConfig, processes: int) -> Path | None:
    if not (out / RUN_CONFIG).is_file():
        raise UserError(f"--resume: {out} holds no run (no {RUN_CONFIG}); give the folder of one, or a new folder")
    record = _read_record(out)
    changed = changed_steps(record, config, processes)
    before, now = rows_of_a_step(record, processes), config.batch_size * config.grad_accum * processes
    if before != now and not changed:
        raise UserError(
            f"--resume: {out} was trained with {before} rows a step; --batch_size {config.batch_size} × --grad_accum "
            f"{config.grad_accum} × {processes} processes are {now}: change --grad_accum"
        )
    if changed:
        differences = ", ".join(f"--{name} {now!r} (was {before!r})" for name, (before, now) in changed.items())
        raise UserError(f"--resume: {out} was trained with other options: {differences}")
    return newest_checkpoint(out)


def _read_record(out: Path) -> dict[str, Any]:
    file = out / RUN_CONFIG
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(record["config"], dict) and isinstance(record["data_fingerprint"], str):
            return record
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"--resume: {file}: is no record of a training; begin in another --output_dir")


def check_same_inputs(out: Path, record: dict[str, Any]) -> None:
    """Raise UserError when the run in `out` read something else: files that `--data` and others name have changed."""
    if not (out / RUN_CONFIG).is_file():
        return
    before = _read_record(out)
    config = record["config"]
    require(
        before.get("model_fingerprint") in (None, record["model_fingerprint"]),
        f"--resume: {out} began from other weights than lie in --model {config['model']} now: begin in another "
        "--output_dir",
    )
    require(
        before.get("rules_in_order") in (None, record["rules_in_order"]),
        f"--resume: {out} was trained with --rules in another order, by which they are drawn: give them in that of "
        f"rules_in_order in its {RUN_CONFIG}",
    )
    require(
        before["data_fingerprint"] == record["data_fingerprint"],
        f"--resume: {out} was trained on other rows; what --data reads, or the version of sparsekv that makes "
        "rows of it, has changed since: begin in another --output_dir",
    )
    require(
        before.get("teacher_fingerprint") == record["teacher_fingerprint"],
        f"--resume: {out} began as another adapter than lies in --teacher_adapter "
        f"{config['teacher_adapter']} now: begin in another --output_dir",
    )


def check_same_division(checkpoint: Path | None, divided: bool) -> None:
    """Raise UserError when only one of a checkpoint and this run is divided by FSDP, which has files of its own."""
    if checkpoint is not None and any(checkpoint.glob(f"{FSDP_MODEL_NAME}*")) != divided:
        was, now = ("without", "with") if divided else ("with", "without")
        raise UserError(
            f"--resume: {checkpoint} was written {was} FSDP and cannot be read {now} it; start it as before"
        )


@contextlib.contextmanager
def alone_in(out: Path, config: TrainConfig, processes: int, checkpoint: Path | None) -> Iterator[None]:
    """Make the folder; inside, no other training writes there.

    Raises
    ------
    UserError
        One is at work there, or another than `checkpoint` is the one to resume from by now.
    """
    lock = out / ".lock"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with held(lock, f"--output_dir {out}: another sparsekv train is at work in it; wait, or give another folder"):
        try:
            unchanged = usable_checkpoint(out, config, processes) == checkpoint and not is_finished(out)
            require(unchanged, f"--output_dir {out}: another sparsekv train wrote there meanwhile; start again")
            yield
        finally:
            lock.unlink(missing_ok=True)


def prepare_output_dir(out: Path, record: dict[str, Any]) -> None:
    """Clear what a killed run left half-written, and record the run."""
    with writing(out):
        shutil.rmtree(out / STAGING, ignore_errors=True)
        write_json(out / RUN_CONFIG, record)


@contextlib.contextmanager
def removed_if_unused(out: Path) -> Iterator[None]:
    """Inside, a UserError takes a folder with it that was made (transformers makes one early) and holds nothing."""
    existed = out.exists()
    try:
        yield
    except UserError:
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


def run_record(
    config: TrainConfig, model_config: PreTrainedConfig, data_fingerprint: str, processes: int
) -> dict[str, Any]:
    """What is needed to run this again: options, processes, versions, commit, weights, data, the teacher's adapter."""
    teacher = config.teacher_adapter
    packages = ("torch", "transformers", "peft", "kvpress", "accelerate", "datasets")
    return {
        "config": asdict(config),
        "processes": processes,
        "versions": versions(packages),
        "commit": commit(),
        "rules_in_order": list(config.rules),
        "model_fingerprint": model_fingerprint(config.model, model_config),
        "data_fingerprint": data_fingerprint,
        "teacher_fingerprint": None if teacher is None else fingerprint(Path(teacher)),
    }


def save_final(trainer: EITTrainer, out: Path, record: dict[str, Any]) -> None:
    """Write `final/`: the adapter (or model), tokenizer, record, schedule and model card; whole or not at all."""
    staged = out / STAGING / FINAL
    if trainer.is_fsdp_enabled:  # its default leaves the model in shards, which nothing else can read
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with writing(out):
        trainer.save_model(str(staged))
        if trainer.args.should_save:
            _finish(trainer, staged, out, record)


def _finish(trainer: EITTrainer, staged: Path, out: Path, record: dict[str, Any]) -> None:
    for weights in staged.glob("*.safetensors"):
        readable(weights)
    (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle; eit_config.json says the same in plain text
    write_json(staged / RUN_CONFIG, record)
    write_json(staged / SCHEDULER_STATE, trainer.schedule.state_dict())
    write_text(staged / "README.md", model_card(record, trainer.state.log_history))
    shutil.rmtree(out / FINAL, ignore_errors=True)
    os.replace(staged, out / FINAL)
    shutil.rmtree(out / STAGING, ignore_errors=True)
