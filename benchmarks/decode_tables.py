"""What benchmarks/decode.py writes: steps and first tokens as Markdown, against the bytes that a step must read."""

import argparse
from typing import Any

import torch
from decode_caches import NAMES, REPEATS, ROOM, STEPS

from sparsekv.version import commit

GIB = 2**30
PREFILLS = 4  # timed, of each kind, in turns
SHARES = {"whole": 1.0, "of which 50% are kept": 0.5, "20%": 0.2, "10%": 0.1}


def weight_bytes(model: Any) -> int:
    """Of a step: the embedding table is looked up, unless it is the head too."""
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    return sum(weight.nbytes for weight in model.parameters()) - (0 if tied else table.nbytes)


def entry_bytes(model: Any) -> int:
    """Of one token in all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def table(options: argparse.Namespace, model: Any, bandwidth: float, rows: list[tuple]) -> str:
    """The steps as Markdown."""
    on_gpu = options.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    what = "Qwen3-8B's shape, random weights, bfloat16" if on_gpu else "a tiny shape, float32"
    lines = [
        "| cache | context | held | batch | ms a step | tokens/s | × floor | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell, seconds, peak in rows:
        floor = (weight_bytes(model) + cell.batch * cell.kept * entry_bytes(model)) / bandwidth
        name = f"{NAMES[cell.contender]} | {cell.context:,} | {cell.kept:,} | {cell.batch}"
        if isinstance(seconds, str):
            lines.append(f"| {name} | {seconds} | – | – | – |")
        else:
            memory = "–" if peak is None else f"{peak:.1f}"
            rate = f"{1000 * seconds:.1f} | {cell.batch / seconds:,.0f} | {seconds / floor:.2f}"
            lines.append(f"| {name} | {rate} | {memory} |")
    return (
        f"{what}, {where}, torch {torch.__version__}; median of {REPEATS} runs of {STEPS} steps; floor: "
        f"{weight_bytes(model) / GIB:.2f} GiB of weights and {entry_bytes(model) / 1024:.0f} KiB an entry at "
        f"{bandwidth / 1e12:.2f} TB/s; commit {commit() or 'unknown'}.\n\n" + "\n".join(lines) + "\n\n"
    )


def prefill_table(rows: list[tuple]) -> str:
    """The first tokens as Markdown, each way against the first of its context."""
    lines = [
        "| read by | context | ms to the first token | of the first | peak GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    first: dict[int, Any] = {}
    for context, name, seconds, peak in rows:
        if isinstance(seconds, str):
            lines.append(f"| {name} | {context:,} | {seconds} | – | – |")
            continue
        share = seconds / first.setdefault(context, seconds)
        memory = "–" if peak is None else f"{peak:.1f}"
        lines.append(f"| {name} | {context:,} | {1000 * seconds:.0f} | {share:.3f} | {memory} |")
    return f"One text, 20% kept; median of {PREFILLS} readings in turns.\n\n" + "\n".join(lines) + "\n\n"


def batches_that_fit(model: Any, options: argparse.Namespace) -> str:
    """How many texts the GPU holds beside the weights, by bytes alone."""
    if options.device == "cpu":
        return ""
    left = torch.cuda.get_device_properties(0).total_memory - sum(weight.nbytes for weight in model.parameters())
    context = options.contexts[-1]
    parts = [(name, int(left // (entry_bytes(model) * (share * context + ROOM)))) for name, share in SHARES.items()]
    texts = ", ".join(f"{count} {name}" for name, count in parts)
    return f"Texts of {context:,} tokens that fit beside the weights, by bytes alone: {texts}."
