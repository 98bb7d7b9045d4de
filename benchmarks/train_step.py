"""Cost of a training step: tokens/s, time by part, memory, and the distance to what the hardware allows.

    python benchmarks/train_step.py                                                 # a CPU: smollm2-135m, a short row
    python benchmarks/train_step.py --shape qwen3-8b --compile --baseline --check   # a GPU: an 8B's shape, bfloat16
    python benchmarks/train_step.py --shape qwen3-8b --lengths 32768 --checkpointing --block "train_step cuda long"
    python benchmarks/train_step.py --shape qwen3-8b --compile --float8 --check     # frozen weights in float8
    … --doc docs/performance.md                                                     # write the figures there
    accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 benchmarks/train_step.py --shape …

Steps are those of `sparsekv train` on random tokens, with its default adapter: `--steps` of them are timed together,
and as many again part by part; both take the same cuts and rules. Times are those of a micro-batch, with its share of
the optimizer's work. The floor is `step_flops` (step_costs.py) at the rate of a large matrix product, measured first.
`--check` compares loss and gradients with dense_reference.py in float32, the same entries kept. A row that does not fit
into memory says so.

Under a launcher every process trains, with a GPU of its own. Each steps only once it has everybody's gradients, so a
window of whole steps is the same steps in all of them, and no barrier is needed to time it. The slowest process counts,
and the largest peak of memory; tokens/s are those of all together, and the loss is the mean of all steps and processes.
Out of memory, a process then leaves the others waiting: it ends with its traceback, and the launcher ends the job.
"""

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from accelerate.state import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from dense_reference import DenseTrainer, dense_attention, dense_loss
from shapes import SHAPES, make_model, make_tokenizer
from step_costs import Clock, matrix_rate, out_of_memory, step_flops, synchronized
from step_tables import DENSE, Row, records, tables, title
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import sparsekv.training.eit_trainer
from sparsekv.adapters import attach_lora
from sparsekv.errors import UserError, require
from sparsekv.files import fill_block, write_json
from sparsekv.training.compiled import compile_layers, compile_logit_sums
from sparsekv.training.config import TrainConfig, default_rules
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.training.eviction import ForwardEviction
from sparsekv.training.flash_kernels import use_newest_for
from sparsekv.training.float8 import drop_float8, use_float8
from sparsekv.training.run import training_arguments

CHECKED = 1024  # tokens: dense masks of longer rows do not fit beside float32 weights
LENGTHS = {"cuda": [2048, 4096], "cpu": [128]}
STEPS = {"cuda": 4, "cpu": 2}
ACCUMULATED = {"cuda": 8, "cpu": 1}  # micro-batches of a step; on a GPU as many as in the shipped configurations
KEEP = {"scheduler_mode": "fixed", "min_keep_ratio": 0.3}
PLAIN = {
    "lambda_context": 0.0,
    "lambda_ce_context": 0.0,
    "lambda_selection": 0.0,
    "rules": dict.fromkeys(default_rules(), 1.0),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "control": {"control": True},
    "keep 0.3": {"ratio_draw": "ceiling"},
    "mixture": {},
    "selection loss": {"lambda_selection": 1.0},
    "whole loss": {"lambda_selection": 1.0, "lambda_context": 1.0, "lambda_ce_context": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row; default: 2,048 and 4,096 on a GPU")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--grad_accum", type=int, help="micro-batches of an optimizer step; default: 8 on a GPU")
    parser.add_argument("--num_cuts", type=int, default=TrainConfig.num_cuts)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="timed together, and as many by part; default: 4 on a GPU")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--compile", action="store_true", help="each variant compiled; dense masks are not")
    parser.add_argument("--float8", action="store_true", help="each variant with frozen weights in float8")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in backward")
    parser.add_argument("--baseline", action="store_true", help="also dense masks and full logits")
    parser.add_argument("--check", action="store_true", help="also compare with dense masks and full logits")
    parser.add_argument("--profile", action="store_true", help="also the kernels of one more step, by time")
    parser.add_argument("--doc", type=Path, help="Markdown file whose block is replaced")
    parser.add_argument("--block", help="its name; default: train_step and the device")
    parser.add_argument("--json", type=Path, help="file that the rows are written to as well")
    options = parser.parse_args()
    options.lengths = options.lengths or LENGTHS[options.device]
    options.steps = options.steps or STEPS[options.device]
    options.grad_accum = options.grad_accum or ACCUMULATED[options.device]
    set_verbosity_error()
    disable_progress_bar()
    state = join(options)
    rate = matrix_rate(options.device)
    rows: list[Row] = []
    try:
        for row in planned(options):
            run(lambda row=row: measure(options, row), row)
            done = row.seconds if isinstance(row.seconds, str) else f"{1000 * row.seconds:,.1f} ms"
            state.print(f"{', '.join(title(row))} tokens: {done}", flush=True)
            rows.append(row)
    finally:  # what is known when another row fails
        text = tables(options, rows, rate)
        state.print(f"\n{text}", flush=True)
    if state.is_main_process:
        write(options, rows, text)
    state.destroy_process_group()


def join(options: argparse.Namespace) -> PartialState:
    """Meet the other processes of a launcher, if any; notes how many, and what divides the work among them.

    Raises
    ------
    UserError
        An option that has no meaning there.
    """
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    options.processes = int(os.environ.get("WORLD_SIZE", "1"))
    options.distribution = "FSDP2" if sharded else "DDP" if options.processes > 1 else "one process"
    for flag in ("baseline", "check", "profile"):
        require(options.processes == 1 or not getattr(options, flag), f"--{flag}: is for one process; start no others")
    require(not (sharded and options.float8), "--float8: does not work with FSDP; start with DDP, or one process")
    require(not sharded or options.device == "cuda", "--device cpu: accelerate divides a model among GPUs only")
    return PartialState(cpu=options.device == "cpu")


def write(options: argparse.Namespace, rows: list[Row], text: str) -> None:
    """The tables and the rows, where they are asked for."""
    if options.json:
        write_json(options.json, records(options, rows))
    if options.doc:
        fill_block(options.doc, options.block or f"train_step {options.device}", text)


def planned(options: argparse.Namespace) -> Iterator[Row]:
    for length in options.lengths:
        if options.baseline:
            yield Row(DENSE, length, False)
        yield from (Row(name, length, options.compile, options.float8) for name in options.variants)


def run(measured: Callable[[], None], row: Row) -> None:
    """Measure a row; one that does not fit into one process's memory says so, and leaves nothing behind."""
    torch._dynamo.reset()
    try:
        measured()
    except RuntimeError as error:
        if torch.distributed.is_initialized() or not out_of_memory(error):
            raise
        row.seconds = row.seconds or "out of memory"
    gc.collect()
    torch.cuda.empty_cache()


# ---- one row ----


def measure(options: argparse.Namespace, row: Row) -> None:
    """Fill in what a row takes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, row, folder)
        row.flops = step_flops(trainer.base, options.batch_size, row.length)
        stopwatch = Stopwatch(options, row, trainer)
        trainer.add_callback(stopwatch)
        with stopwatch.clock:
            loss = trainer.train().training_loss
        check_evicted(trainer, row)
        combine(row, loss)
        if options.check and row.length == options.lengths[0] and row.name in ("control", "keep 0.3", "mixture"):
            row.check = compare(trainer)


def check_evicted(trainer: EITTrainer, row: Row) -> None:
    """A step in which some layers did not evict costs less than it says."""
    evicted = None if row.name == DENSE else trainer.eviction.last
    layers = trainer.base.config.num_hidden_layers
    if evicted is not None and len(evicted.keeps) != layers:
        raise AssertionError(f"{row.name}: {len(evicted.keeps)} of {layers} layers evicted")


def combine(row: Row, loss: float) -> None:
    """What all processes have found: the slowest one's times, the largest peak, the mean loss of the steps."""
    seconds, first, peaks, losses = zip(*gather_object([(row.seconds, row.first, row.peak, loss)]), strict=True)
    row.seconds, row.first, row.loss = max(seconds), max(first), sum(losses) / len(losses)
    row.peak = None if row.peak is None else max(peaks)


def make_trainer(options: argparse.Namespace, row: Row, folder: str) -> EITTrainer:
    """As `sparsekv train` makes it, with an adapter that changes the output, and as many plans as timed steps."""
    config = TrainConfig(
        model=options.shape,
        output_dir=folder,
        device_map="cpu" if options.device == "cpu" else None,
        batch_size=options.batch_size,
        grad_accum=options.grad_accum,
        max_steps=options.warm_up + 2 * options.steps + options.profile,
        max_seq_len=row.length,
        gradient_checkpointing=options.checkpointing,
        num_cuts=options.num_cuts,
        eval_steps=0,
        **KEEP | PLAIN | VARIANTS.get(row.name, VARIANTS["keep 0.3"]),
    )
    args = training_arguments(config)
    args.save_strategy = args.logging_strategy = "no"
    args.disable_tqdm, args.logging_first_step = True, False
    torch.manual_seed(0)
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    base = make_model(options.shape, dtype, options.device, sharded=options.distribution == "FSDP2")
    base.config.max_position_embeddings = 2**20  # speed does not depend on it; rows may be longer than the model's own
    model = attach_lora(base, config.lora_r, config.lora_alpha, config.lora_targets)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    number = config.max_steps * config.grad_accum * config.batch_size * options.processes
    ids = torch.randint(5, 40_000, (number, row.length)).tolist()
    data = Dataset.from_dict({"input_ids": ids})
    kind = DenseTrainer if row.name == DENSE else EITTrainer
    trainer = kind(model, config, make_tokenizer(options.shape), args, train_dataset=data)
    trainer.current_plan = lambda length: trainer.sampler.draw(
        trainer.state.global_step % options.steps, length, config.min_keep_ratio
    )
    use_newest_for(trainer.base)
    if row.float8:
        use_float8(trainer.base)
    if row.compiled:
        compile_layers(trainer.base)
        trainer.logit_sums = compile_logit_sums()
    return trainer


class Stopwatch(TrainerCallback):
    """Times training: the first step, then `steps` together, then as many by part."""

    def __init__(self, options: argparse.Namespace, row: Row, trainer: EITTrainer) -> None:
        self.options, self.row, self.clock = options, row, Clock(options.device)
        self.functions = {
            "teacher": (trainer, "_teacher_hidden"),
            "student": (trainer, "compute_loss"),
            "scores": (ForwardEviction, "decide"),
            "head": (sparsekv.training.eit_trainer, "distillation_loss"),
            "backward": (trainer.accelerator, "backward"),
        }

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun, self.graphs = synchronized(), graphs()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        done, steps, row = state.global_step - self.options.warm_up, self.options.steps, self.row
        if state.global_step == 1:
            row.first = synchronized() - self.begun
        if done == 0:
            if self.options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.begun = synchronized()
            self.graphs = graphs()
        elif done == steps:
            row.seconds = (synchronized() - self.begun) / (steps * self.options.grad_accum)
            if self.options.device == "cuda":
                row.peak = torch.cuda.max_memory_allocated() / 2**30
            self.clock.start(self.functions)
        elif done == 2 * steps:
            batches = steps * self.options.grad_accum
            row.parts = {part: seconds / batches for part, seconds in self.clock.stop().items()}
            row.graphs = graphs() - self.graphs
            self.profiler = torch.profiler.profile() if self.options.profile else None
            if self.profiler:
                self.profiler.start()
        elif done == 2 * steps + 1:
            synchronized()
            self.profiler.stop()
            print(kernels(self.profiler, self.options.device), flush=True)


def kernels(profiler: torch.profiler.profile, device: str) -> str:
    """What a GPU did (on a CPU, which operations took long), the longest first, and how often."""
    averages = profiler.key_averages()
    if device == "cpu":
        return averages.table(sort_by="self_cpu_time_total", row_limit=20)
    found = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
    busy, count = sum(event.self_device_time_total for event in found) / 1000, sum(event.count for event in found)
    longest = sorted(found, key=lambda event: -event.self_device_time_total)[:20]
    lines = [f"{event.self_device_time_total / 1000:9.2f} ms {event.count:7d}  {event.key[:90]}" for event in longest]
    return "\n".join([f"{busy:,.1f} ms in {count:,} kernels of one step", *lines])


def graphs() -> int:
    """Compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compare(trainer: EITTrainer) -> tuple[float, ...]:
    """Relative difference of the loss and cosine of the gradients to dense masks in float32, the same entries kept.

    First of the fast step, then of dense masks in the dtype of the fast step: what rounding alone does.
    """
    inputs = {name: ids[:, :CHECKED] for name, ids in next(iter(trainer.get_train_dataloader())).items()}

    def result(loss: torch.Tensor) -> tuple[float, torch.Tensor]:
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        gradient = torch.cat([weight.grad.flatten().double() for weight in weights])
        trainer.model.zero_grad()
        return loss.item(), gradient

    trainer.model.zero_grad()
    found = [result(trainer.training_step(trainer.model_wrapped, inputs, trainer._count_tokens([inputs])))]
    keeps = None if trainer.eviction.last is None else trainer.eviction.last.keeps
    cuts = trainer.current_plan(inputs["input_ids"].shape[1]).cuts
    drop_float8(trainer.base)
    with dense_attention(trainer.base):
        for cast in (lambda: None, trainer.base.float):
            cast()
            loss = dense_loss(trainer.model_wrapped, inputs["input_ids"], cuts, keeps)
            loss.backward()
            found.append(result(loss))
    *others, (exact_loss, exact) = found
    return tuple(
        figure
        for loss, gradient in others
        for figure in (abs(loss / exact_loss - 1), torch.cosine_similarity(gradient, exact, dim=0).item())
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"train_step.py: {error}", file=sys.stderr)
        sys.exit(2)
