"""From a TrainConfig to an adapter on disk."""

import atexit
import contextlib
import gc
import logging
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from datasets import Dataset
from peft import PeftModel
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations

from sparsekv.data import build_datasets, parse_sources
from sparsekv.errors import UserError, gist, require
from sparsekv.files import FINAL
from sparsekv.models import PLACEMENTS, check_ids, load_model, load_tokenizer, may_make_unknown_ids
from sparsekv.observe import observing
from sparsekv.presses import why_not
from sparsekv.training.anchor import overflow_unreported
from sparsekv.training.callbacks import IntervalsCallback, MetricsCallback, StopCallback
from sparsekv.training.choices import PRESS_RULES
from sparsekv.training.compiled import compile_layers, compile_logit_sums
from sparsekv.training.config import TrainConfig
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.training.eviction import slides
from sparsekv.training.flash_kernels import active, use_newest_for
from sparsekv.training.float8 import drop_float8, use_float8
from sparsekv.training.kv_dropout import KVDropoutContext, attention_modules
from sparsekv.training.networks import check_teacher_adapter, student_and_teacher
from sparsekv.training.output import (
    alone_in,
    check_same_division,
    check_same_inputs,
    is_finished,
    prepare_output_dir,
    removed_if_unused,
    run_record,
    save_final,
    usable_checkpoint,
)
from sparsekv.training.peers import others_alive
from sparsekv.training.plan import EvictionPlan
from sparsekv.training.record import rows_of_a_step

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Path | None:
    """Train and save; everything that can be wrong with the input is found before anything is written.

    Returns
    -------
    Path or None
        `output_dir/final`, or None when a signal stopped the run (it can then be resumed).

    Raises
    ------
    UserError
        If an option, the model, the data or the output folder cannot work.
    """
    out = Path(config.output_dir)
    args = training_arguments(config)
    checkpoint = usable_checkpoint(out, config, args.world_size)
    args.distributed_state.wait_for_everyone()  # no process writes before every one has looked
    if is_finished(out):
        return out / FINAL  # resumed, and nothing is left to do
    check_teacher_adapter(config)
    args.eval_on_start = checkpoint is None
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    dtype = "float32" if config.dtype == "auto" and not config.lora_r else config.dtype  # bfloat16 loses small steps
    base = load_model(config.model, dtype, config.device_map, config.trust_remote_code)
    _check_length(base, config)
    *rows, fingerprint = build_datasets(
        parse_sources(config.data),
        tokenizer,
        config.max_seq_len,
        config.num_train_samples,
        config.num_validation_samples,
        config.seed,
        config.data_subset,
    )
    _check_tokens(rows, tokenizer, base, config.model)
    set_seed(config.seed)  # the adapter's initialisation does not depend on how the data was read
    model, teacher = student_and_teacher(base, config, args)
    record = run_record(config, base.config, fingerprint, args.world_size) | {"validation_rows": len(rows[1])}
    check_same_inputs(out, record)
    with removed_if_unused(out):
        trainer = _make_trainer(model, teacher, tokenizer, config, args, rows)
        check_same_division(checkpoint, trainer.is_fsdp_enabled)
        use_newest_for(trainer.base)
        _check_architecture(trainer, config, rows[0])
        record |= _speed_up(trainer, teacher, config)
        with alone_in(out, config, args.world_size, checkpoint) if args.should_save else contextlib.nullcontext():
            if args.should_save:
                prepare_output_dir(out, record)
                print(_passes(record, config))
            args.distributed_state.wait_for_everyone()
            final = _run(trainer, out, record, checkpoint)
    if args.world_size > 1:
        atexit.register(_leave_group, args.distributed_state)
    return final


def _passes(record: dict[str, Any], config: TrainConfig) -> str:
    """How often the rows are used: larger steps than were meant would show nowhere else."""
    rows, step = config.num_train_samples, rows_of_a_step(record, 1)
    passes = config.max_steps * step / rows if config.max_steps > 0 else config.num_train_epochs
    return f"rows: {rows:,}, each {passes:.3g} times; {step:,} an optimizer step"


def _speed_up(trainer: EITTrainer, teacher: PreTrainedModel | None, config: TrainConfig) -> dict[str, Any]:
    """Change the layers as the options ask; what that makes of the arithmetic, for the record."""
    float8 = config.float8 and _use_float8(trainer)
    if config.compile:
        _compile(trainer, teacher)
    return {"flash_attention": active() or "torch", "float8": float8}


def _use_float8(trainer: EITTrainer) -> bool:
    """Let frozen layers compute in float8; where that cannot be, the steps are slower and more exact."""
    networks = [network for network in (trainer.base, trainer.teacher) if network is not None]
    try:
        require(not trainer.is_fsdp_enabled, "--float8: does not work with FSDP; start with DDP, or on one GPU")
        for network in networks:
            use_float8(network)
    except UserError as error:
        for network in networks:
            drop_float8(network)
        logger.warning("%s; going on without it", error)
        return False
    return True


def _compile(trainer: EITTrainer, teacher: PreTrainedModel | None) -> None:
    """Compile layers and loss; where that cannot be, the steps are slower and the same but for rounding."""
    try:
        for network in filter(None, (trainer.base, teacher)):
            compile_layers(network)
    except UserError as error:
        logger.warning("%s; going on without it", error)
        return
    trainer.logit_sums = compile_logit_sums()


def _leave_group(state: PartialState) -> None:
    """Leave the other processes in order: a group that the end of the interpreter finds may abort there."""
    gc.collect()  # the wrapped model, which is no longer used, holds the group too
    state.destroy_process_group()


def _run(trainer: EITTrainer, out: Path, record: dict[str, Any], checkpoint: Path | None) -> Path | None:
    stop = StopCallback()
    trainer.add_callback(stop)
    if checkpoint is not None:
        trainer.load_schedule(checkpoint)
    started = time.perf_counter()
    with others_alive(lambda: stop.asked):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except TorchDynamoException as error:  # of what only some models do
            kind = type(trainer.base).__name__
            raise UserError(f"--compile: {kind} cannot be compiled here, give false: {gist(error)}") from error
        finally:
            stop.restore()
        if stop.stopped:
            return None
        if not trainer.evaluated():
            trainer.evaluate()
        record = {**record, "seconds": round(time.perf_counter() - started, 1), "steps": trainer.state.global_step}
        save_final(trainer, out, record)
    return out / FINAL


def _check_length(base: PreTrainedModel, config: TrainConfig) -> None:
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_seq_len > longest:
        raise UserError(f"--max_seq_len {config.max_seq_len}: {config.model} has {longest} positions")


def _check_tokens(
    rows: Sequence[Dataset], tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, name: str
) -> None:
    """Look at every row where the tokenizer has tokens that the model does not know."""
    if may_make_unknown_ids(tokenizer, base.config):
        for part in rows:
            for batch in part.with_format("torch").iter(1000):
                check_ids(batch["input_ids"], base.config, name)


def _check_architecture(trainer: EITTrainer, config: TrainConfig, rows: Dataset) -> None:
    """Run a short row under every rule: one that the model does not work with is known before anything is written."""
    require(
        not all(slides(layer, config.max_seq_len) for layer in attention_modules(trainer.base.get_decoder())),
        f"--max_seq_len {config.max_seq_len}: every layer of {config.model} has a sliding window, and evicts nothing "
        "of rows as long as that or longer; give shorter rows, or another model",
    )
    ids = torch.tensor([rows[0]["input_ids"][:96]], device=trainer.base.device)  # presses score 65 tokens and more
    evicting: set[int] = set()
    for rule in config.rules:
        reason = why_not(rule, trainer.base) if rule in PRESS_RULES else None
        require(reason is None, f"--rules {reason}; give another rule")
        plan = EvictionPlan("two_region", (ids.shape[1] - 2,), (rule,), (0.5,))
        try:
            evicting_once = KVDropoutContext(trainer.base, plan, trainer.selector)
            with torch.no_grad(), overflow_unreported(), evicting_once as eviction:  # the cuts to come are others
                trainer.base.get_decoder()(input_ids=ids)
        except UserError:
            raise
        except Exception as error:  # whatever a press or an attention of another kind may raise
            kind = type(trainer.base).__name__
            raise UserError(f"--rules {rule}: does not work with --model {config.model}, {kind}: {error}") from error
        if eviction.last is not None:
            eviction.last.keep_ratio()  # complains when no layer evicted anything
            evicting.update(eviction.last.keeps)
    if trainer.args.should_log and not config.control:
        _say_what_stays(trainer.base, config.model, evicting)
    if config.selects:
        try:
            with torch.no_grad(), observing(trainer.base, lambda *_: None, plain_only=True):
                trainer.base.get_decoder()(input_ids=ids, use_cache=False)
        except ValueError as error:
            flag = f"--lambda_selection {config.lambda_selection:g}"
            raise UserError(f"{flag}: does not work with --model {config.model}, give 0: {error}") from error


def _say_what_stays(base: PreTrainedModel, name: str, evicting: Set[int]) -> None:
    """Name the layers that keep everything: the training evicts less than it seems to."""
    whole = sorted(set(range(base.config.get_text_config().num_hidden_layers)) - evicting)
    if whole:
        layers = ", ".join(map(str, whole))
        reason = "they have a sliding window, or attention of another kind"
        logger.warning("--model %s: layers %s evict nothing: %s", name, layers, reason)


def _make_trainer(
    model: PreTrainedModel | PeftModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    args: TrainingArguments,
    rows: list[Dataset],
) -> EITTrainer:
    if teacher is not None and not hasattr(teacher, "hf_device_map"):
        torch.nn.Module.to(teacher, args.device)
    trainer = EITTrainer(
        model,
        config,
        tokenizer,
        args,
        teacher=teacher,
        train_dataset=rows[0],
        eval_dataset=rows[1],
    )
    trainer.add_callback(IntervalsCallback())
    trainer.add_callback(MetricsCallback(config.output_dir))
    return trainer


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's own options for a run."""
    loggers = get_available_reporting_integrations()
    for name in config.report_to:
        if name not in loggers:
            raise UserError(f"--report_to {name}: not known or not installed; here is {', '.join(loggers) or 'none'}")
    # Apple's GPUs lack float64 and a fast masked attention: train on their CPUs.
    use_cpu = config.device_map == "cpu" or not torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.max_steps,
        num_train_epochs=config.num_train_epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=1,  # each row its own rule, whatever the batch size
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.lr_warmup_fraction,  # below 1: a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=not use_cpu and config.dtype in ("auto", "bfloat16") and torch.cuda.is_bf16_supported(False),
        use_cpu=use_cpu,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a diverging run, and wait for the GPU after every micro-batch
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        save_strategy="steps",
        save_steps=config.save_steps,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        metric_for_best_model="eval_evicted_ppl",
        greater_is_better=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=config.report_to,
        seed=config.seed,
        data_seed=config.seed,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    if args.world_size > 1 and config.device_map in PLACEMENTS:
        raise UserError(f"--device_map {config.device_map}: one process a GPU was launched; drop it, or the launcher")
    if args.device.type == "cpu":  # accelerate's name for it is cpu:0, from where torch.load can resume nothing
        args._setup_devices = args.distributed_state.device = torch.device("cpu")
    return args
