"""Cost of a training step: operations, time and memory, with and without eviction, selection loss and compiled layers.

    python benchmarks/train_step.py                                      # smollm2-135m on a CPU, tiny rows
    python benchmarks/train_step.py --batch_size 16 --max_seq_len 1024   # a GPU, bfloat16
    … --doc docs/training.md                                             # write the figures there

Operations are those of teacher, student and backward that are no views, a proxy for kernels; they are counted in a step
of its own, and without compilation. Tokens are random, and every variant takes the same plans.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import TrainingArguments
from transformers.utils.logging import disable_progress_bar

import sparsekv.attention
from sparsekv.files import fill_block
from sparsekv.models import attach_lora, load_model, load_tokenizer
from sparsekv.training.compiled import compile_layers
from sparsekv.training.config import EITConfig
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.version import commit

MODEL = "smollm2-135m"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "control": {"control": True},
    "evicted": {},
    "evicted, selection loss": {"lambda_selection": 1.0},
    "the same, two cuts": {"lambda_selection": 1.0, "num_cuts": 2},
}
WARM_UP, COUNTED = 2, 2  # steps


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--max_seq_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a variant")
    parser.add_argument("--compile", action="store_true", help="also each variant with compiled layers")
    parser.add_argument("--doc", type=Path, help="Markdown file whose block for this device is replaced")
    options = parser.parse_args()
    disable_progress_bar()
    uncounted_masks()
    compiled = (False, True) if options.compile else (False,)
    rows = [measure(options, name, compile) for compile in compiled for name in VARIANTS]
    text = table(options, rows)
    Console().print(text, highlight=False)
    if options.doc:
        fill_block(options.doc, f"train_step {options.device}", text)


def uncounted_masks() -> None:
    """CausalBias, a tensor subclass, cannot be made under a dispatch mode."""
    make = sparsekv.attention.causal_lower_right

    def quiet(*sizes: int) -> Any:
        with _disable_current_modes():
            return make(*sizes)

    sparsekv.attention.causal_lower_right = quiet


def measure(options: argparse.Namespace, name: str, compile: bool) -> dict[str, Any]:
    """One variant: its name, operations a step (None when compiled), median seconds, peak GiB (None on a CPU)."""
    torch.manual_seed(0)
    trainer = make_trainer(options, VARIANTS[name])
    ids = torch.randint(5, 40_000, (options.batch_size, options.max_seq_len), device=trainer.args.device)
    if compile:
        compile_layers(trainer.base)

    def step(number: int) -> None:
        trainer.state.global_step = number  # another plan
        trainer.training_step(trainer.model, {"input_ids": ids}, trainer._count_tokens([{"input_ids": ids}]))
        if options.device == "cuda":
            torch.cuda.synchronize()

    for number in range(WARM_UP):
        step(number)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(options.steps):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None
    operations = None
    if not compile:
        with Operations() as counter:
            for number in range(COUNTED):
                step(number)
        operations = counter.count / COUNTED
    name = f"{name}, compiled" if compile else name
    return {"name": name, "operations": operations, "seconds": statistics.median(seconds), "peak": peak}


def make_trainer(options: argparse.Namespace, variant: dict[str, Any]) -> EITTrainer:
    """A trainer with an adapter of rank 12 everywhere; the keep ratio is in its middle from the first step."""
    on_gpu = options.device == "cuda"
    model = load_model(MODEL, "bfloat16" if on_gpu else "float32", options.device)
    arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=not on_gpu, bf16=on_gpu, report_to=[], save_strategy="no")
    config = EITConfig(scheduler_mode="fixed", min_keep_ratio=0.3, **variant)
    rows = Dataset.from_dict({"input_ids": [[0] * options.max_seq_len]})
    return EITTrainer(attach_lora(model, 12, 24, TARGETS), config, load_tokenizer(MODEL), arguments, train_dataset=rows)


def table(options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    on_gpu = options.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    first = rows[0]["seconds"]
    lines = ["| step | operations | seconds | of the control's | peak GiB |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        operations = "–" if row["operations"] is None else f"{row['operations']:,.0f}"
        peak = "–" if row["peak"] is None else f"{row['peak']:.1f}"
        lines.append(f"| {row['name']} | {operations} | {row['seconds']:.2f} | {row['seconds'] / first:.2f} | {peak} |")
    return (
        f"{MODEL}, {'bfloat16' if on_gpu else 'float32'}, r = 12 on attention and MLP, {options.batch_size} × "
        f"{options.max_seq_len:,} tokens, {where}, torch {torch.__version__}; median of {options.steps} steps; "
        f"commit {commit() or 'unknown'}.\n\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    main()
