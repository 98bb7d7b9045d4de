"""The tables of train_step.py."""

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from step_costs import peak_rate

from sparsekv.training.flash_kernels import torch_version
from sparsekv.version import commit

DENSE = "dense masks, full logits"
PARTS = ("teacher", "student", "scores", "head", "backward", "rest")


@dataclass
class Row:
    """A line of the tables: what is run, and what was found."""

    name: str
    length: int
    compiled: bool
    float8: bool = False
    seconds: float | str = ""  # a micro-batch, or why there is none
    flops: float = 0.0  # of the floor
    first: float = 0.0  # seconds of the first step, compilation included
    graphs: int = 0  # compiled after the warm-up
    peak: float | None = None  # GiB of a process
    loss: float | None = None  # mean of all steps, those that are not timed included
    parts: dict[str, float] = field(default_factory=dict)  # seconds a micro-batch
    check: tuple[float, ...] | None = None  # see train_step.compare


def tables(options: argparse.Namespace, rows: list[Row], rate: float) -> str:
    """All figures as Markdown."""
    on_gpu = options.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    floors = {row.length: f"{1000 * row.flops / rate:,.0f} ms for {row.length:,} tokens" for row in rows if row.flops}
    whole = ("step", "tokens", "ms", "tokens/s", "× control", "× floor", "MFU", "peak GiB", "first step s")
    batches = "1 micro-batch" if options.grad_accum == 1 else f"{options.grad_accum} micro-batches"
    text = (
        f"{options.shape}, {'bfloat16' if on_gpu else 'float32'}, {divided(options)}{batches} of "
        f"{options.batch_size} a step, {'with' if options.checkpointing else 'without'} checkpointing, {where}, torch "
        f"{torch_version()}; mean of {options.steps} steps; cuts: {options.num_cuts}; "
        f"floor at {rate / 1e12:.3g} TFLOP/s: {', '.join(floors.values())}; commit {commit() or 'unknown'}.\n\n"
    )
    text += table(whole, [totals(options, row, rows, rate) for row in rows])
    timed = [row for row in rows if row.parts and row.name != DENSE]
    text += table(
        ("ms of a micro-batch", "tokens", *PARTS),
        [[*title(row), *(f"{1000 * row.parts.get(part, 0):,.1f}" for part in PARTS)] for row in timed],
    )
    checked = [row for row in rows if row.check]
    if checked:
        columns = ("against dense masks in float32", "loss, relative", "gradients, cosine")
        cells = [
            [
                title(row)[0],
                *(f"{figure:.1e}" if place % 2 == 0 else f"{figure:.6f}" for place, figure in enumerate(row.check)),
            ]
            for row in checked
        ]
        text += table((*columns, "loss of dense masks", "their gradients"), cells)
    return text


def totals(options: argparse.Namespace, row: Row, rows: list[Row], rate: float) -> list[str]:
    """Cells of a row in the table of whole steps."""
    if isinstance(row.seconds, str):
        return [*title(row), row.seconds, *["–"] * 6]
    alike = (other for other in rows if other.length == row.length)
    control = next((other.seconds for other in alike if other.name == "control"), None)
    peak = peak_rate(options.device)
    return [
        *title(row),
        f"{1000 * row.seconds:,.0f}",
        f"{rate_of(options, row):,.0f}",
        f"{row.seconds / control:.2f}" if isinstance(control, float) else "–",
        f"{row.seconds * rate / row.flops:.2f}" if options.device == "cuda" else "–",
        "–" if peak is None else f"{row.flops / row.seconds / peak:.0%}",
        "–" if row.peak is None else f"{row.peak:.1f}",
        f"{row.first:.1f}" + (f", {row.graphs} graphs later" if row.graphs else ""),
    ]


def divided(options: argparse.Namespace) -> str:
    """`8 processes by FSDP2, each `; nothing where there is one."""
    return "" if options.processes == 1 else f"{options.processes} processes by {options.distribution}, each "


def rate_of(options: argparse.Namespace, row: Row) -> float:
    """Tokens/s of all processes."""
    return options.processes * options.batch_size * row.length / row.seconds


def records(options: argparse.Namespace, rows: list[Row]) -> list[dict[str, Any]]:
    """The rows for other programs: what was run where, tokens/s, GiB of a process, loss, share of the peak."""
    on_gpu, peak = options.device == "cuda", peak_rate(options.device)
    common = {
        "shape": options.shape,
        "checkpointing": options.checkpointing,
        "processes": options.processes,
        "distribution": options.distribution,
        "rows": options.processes * options.grad_accum * options.batch_size,  # of an optimizer step
        "batch_size": options.batch_size,
        "steps": options.warm_up + 2 * options.steps,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch_version(),
        "commit": commit() or "unknown",
    }
    return [
        common
        | {"step": title(row)[0], "length": row.length, "peak": row.peak, "loss": row.loss}
        | (
            {"failed": row.seconds}
            if isinstance(row.seconds, str)
            else {
                "tokens_per_second": rate_of(options, row),
                "mfu": None if peak is None else row.flops / row.seconds / peak,
            }
        )
        for row in rows
    ]


def title(row: Row) -> list[str]:
    return [row.name + ", compiled" * row.compiled + ", float8" * row.float8, f"{row.length:,}"]


def table(columns: tuple[str, ...], cells: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"
