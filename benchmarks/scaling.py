"""Training and evaluation on several GPUs of one host against one of them.

    python benchmarks/scaling.py train                                  # every number of GPUs, DDP and FSDP2
    python benchmarks/scaling.py train --lengths 32768 --checkpointing --gpus 1 2 --how ddp
    python benchmarks/scaling.py eval
    python benchmarks/scaling.py tables --doc docs/performance.md       # what all calls have found
    python benchmarks/scaling.py train --device cpu --shape tiny --lengths 96 --rows 2      # two processes on a CPU

Each measurement is a run of its own, one after another, and is kept in `--results`, where a later one of the same kind
replaces it; all calls print the tables of all that is known there. A run that fails is a line that says so.

`train` runs train_step.py. An optimizer step always has `--rows` rows, of which each process takes `--batch_size` at a
time: micro-batches × processes is constant, and the samplers of all processes together draw what one process draws.
Losses and gradients are sums over the same rows then, and the mean losses of all steps may differ by rounding only.
Efficiency is tokens/s over those of one GPU, divided by the number of GPUs.

`eval` runs `sparsekv eval` on one GPU and under accelerate on several, each into a folder of its own, and compares the
answers. The same command again, which finds all done, is the time to start, but for the weights: a process loads them
when its first answer is due, and that counts as work. Efficiency is the rest on one GPU over the rest on several, by
their number; beside it, the same with the start. A process takes a portion at a time: with `--num_samples` 8 or 16
there are 8 of one size; with 32 there are 13, and 8 GPUs can reach 81% at most.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from shapes import SHAPES
from step_tables import table
from train_step import VARIANTS

from sparsekv.errors import UserError, require
from sparsekv.files import fill_block, write_json
from sparsekv.models import load_tokenizer
from sparsekv.version import commit

ROOT = Path(__file__).parents[1]
TRAIN_STEP = ROOT / "benchmarks" / "train_step.py"
COUNTS = (1, 2, 4, 8)
OUTCOME = {"tokens_per_second", "mfu", "peak", "loss", "failed", "seconds", "start", "answers", "different"}
ORIGIN = ("torch", "commit")  # of a record; all else says what was run
WARM_UP = 2  # steps: FSDP2's compiled steps were slow once more after the first
BUDGET_GIB = {"cuda": "16", "cpu": "1"}  # for caches: what is free may differ, and with it batches and their rounding

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=("train", "eval", "tables"))
    parser.add_argument("--results", type=Path, default=Path("out/scaling.json"), help="file of all that was found")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, nargs="+", help="processes; default: 1, 2, 4, 8 as far as there are")
    parser.add_argument("--how", nargs="+", choices=("ddp", "fsdp2"), help="files of configs/accelerate; default: both")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a run has failed")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="of an optimizer step, over all processes")
    parser.add_argument("--batch_size", type=int, default=1, help="rows of a process's micro-batch")
    parser.add_argument("--step", choices=VARIANTS, default="keep 0.3")
    parser.add_argument("--steps", type=int, default=2, help="timed, after two of warm-up")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--model", default="smollm2-135m", help="of eval")
    parser.add_argument("--context_length", type=int, default=4096, help="of eval")
    parser.add_argument("--num_samples", type=int, default=16, help="of eval, for each of 13 tasks")
    parser.add_argument("--doc", type=Path, help="Markdown file whose block is replaced")
    parser.add_argument("--block", help="its name; default: scaling and the device")
    options = parser.parse_args()
    check(options)
    measured = {"train": train, "eval": evaluate, "tables": lambda _: ()}[options.measure]
    for record in measured(options):
        write_json(options.results, merged(known(options.results), record))
    records = known(options.results)
    require(bool(records), f"--results {options.results}: holds nothing yet")
    text = tables(records)
    print(text)
    if options.doc:
        fill_block(options.doc, options.block or f"scaling {options.device}", text)


def check(options: argparse.Namespace) -> None:
    """Fill in what depends on the machine.

    Raises
    ------
    UserError
        More GPUs than there are, rows that cannot be shared evenly, FSDP without GPUs.
    """
    on_gpu = options.device == "cuda"
    present = torch.cuda.device_count() if on_gpu else 2
    options.gpus = options.gpus or [count for count in COUNTS if count <= present]
    options.how = options.how or (["ddp", "fsdp2"] if on_gpu else ["ddp"])
    require(on_gpu or "fsdp2" not in options.how, "--how fsdp2: accelerate divides a model among GPUs only")
    for count in options.gpus:
        require(not on_gpu or count <= present, f"--gpus {count}: this machine has {present}")
        even = options.measure != "train" or options.rows % (count * options.batch_size) == 0
        shared = f"{count} processes, {options.batch_size} at a time"
        require(even, f"--rows {options.rows}: cannot be shared by {shared}; give a multiple")


# ---- training ----


def train(options: argparse.Namespace) -> Iterator[Record]:
    """What train_step.py finds for every length, number of GPUs and way to divide the work."""
    for length in options.lengths:
        for count in options.gpus:
            for how in options.how if count > 1 else ("",):
                yield from train_records(options, length, count, how)


def train_records(options: argparse.Namespace, length: int, count: int, how: str) -> list[Record]:
    """Of one run."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        arguments = {
            "--shape": options.shape,
            "--device": options.device,
            "--lengths": length,
            "--batch_size": options.batch_size,
            "--grad_accum": options.rows // (count * options.batch_size),
            "--variants": options.step,
            "--steps": options.steps,
            "--warm_up": WARM_UP,
            "--json": found,
        }
        switches = [f"--{name}" for name in ("checkpointing", "compile") if getattr(options, name)]
        words = [str(word) for pair in arguments.items() for word in pair]
        failure, _ = run([*launcher(count, how), str(TRAIN_STEP), *words, *switches], options)
        if not failure:
            return json.loads(found.read_text("utf-8"))
    failed = {
        "shape": options.shape,
        "checkpointing": options.checkpointing,
        "processes": count,
        "distribution": {"ddp": "DDP", "fsdp2": "FSDP2"}.get(how, "one process"),
        "rows": options.rows,
        "batch_size": options.batch_size,
        "steps": WARM_UP + 2 * options.steps,
        "device": device_name(options),
        "step": options.step + ", compiled" * options.compile,
        "length": length,
        "failed": failure,
    }
    return [failed]


# ---- evaluation ----


def evaluate(options: argparse.Namespace) -> Iterator[Record]:
    """Seconds of `sparsekv eval`, alone first, and how many of its answers are others than alone."""
    load_tokenizer(options.model)  # the demo model is made on first use, which is no work of one GPU
    with tempfile.TemporaryDirectory() as folder:
        wanted = {}
        for count in sorted({1, *options.gpus}):
            out = Path(folder) / str(count)
            record = {
                "model": Path(options.model).name,
                "context_length": options.context_length,
                "num_samples": options.num_samples,
                "processes": count,
                "device": device_name(options),
            }
            failure, seconds = run(eval_command(options, count, out), options)
            if failure:
                yield record | {"failed": failure}
                continue
            _, start = run(eval_command(options, count, out), options)
            found = answers(out)
            wanted = wanted or found
            different = sum(wanted.get(place) != text for place, text in found.items())
            yield (
                record
                | {"seconds": seconds, "start": start, "answers": len(found), "different": different}
                | {"torch": torch.__version__, "commit": commit() or "unknown"}
            )


def eval_command(options: argparse.Namespace, count: int, out: Path) -> list[str]:
    arguments = {
        "--model": options.model,
        "--benchmark": "ruler-local",
        "--context_length": options.context_length,
        "--num_samples": options.num_samples,
        "--dtype": "bfloat16" if options.device == "cuda" else "float32",
        "--device": options.device,
        "--memory_budget_gib": BUDGET_GIB[options.device],
        "--out": out,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    return [*launcher(count, "ddp"), "-m", "sparsekv.cli", "eval", *words]


def answers(out: Path) -> dict[tuple[str, int], str]:
    """(cell, row) → answer."""
    return {
        (file.parent.name, row): text
        for file in out.glob("*/predictions.csv")
        for row, text in enumerate(pd.read_csv(file, keep_default_na=False)["predicted_answer"])
    }


# ---- runs ----


def launcher(count: int, how: str) -> list[str]:
    """What starts so many processes of a Python program, one of them without a launcher."""
    if count == 1:
        return [sys.executable]
    file = str(ROOT / "configs" / "accelerate" / f"{how}.yaml")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    return [*accelerate, "--config_file", file, "--num_processes", str(count)]


def run(command: list[str], options: argparse.Namespace) -> tuple[str, float]:
    """Why a command failed, if it did, and its seconds. What it says on stderr is shown in that case only."""
    print(" ".join(command), flush=True)
    # one thread each, as a launcher has it: a process alone must be no faster for having all of the processor
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=options.limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its processes, after half a minute by force
        _, said = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode == 0:
        return "", seconds
    print(said[-5000:], file=sys.stderr, flush=True)
    if seconds > options.limit:
        return f"more than {options.limit:g} s", seconds
    return "out of memory" if "out of memory" in said else f"exit status {process.returncode}", seconds


def device_name(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device == "cuda" else "CPU"


# ---- results ----


def known(results: Path) -> list[Record]:
    """All records so far."""
    return json.loads(results.read_text("utf-8")) if results.is_file() else []


def what(record: Record) -> Record:
    """What was run where, apart from what came of it."""
    return {name: value for name, value in record.items() if name not in OUTCOME.union(ORIGIN)}


def merged(records: list[Record], record: Record) -> list[Record]:
    """The records with a new one, in place of that of the same run."""
    return [*(other for other in records if what(other) != what(record)), record]


def alone(record: Record, records: list[Record]) -> Record:
    """The record of the same run by one process; empty where there is none, or it failed."""
    wanted = what(record) | {"processes": 1}
    if "distribution" in wanted:
        wanted["distribution"] = "one process"
    return next((other for other in records if what(other) == wanted and "failed" not in other), {})


def tables(records: list[Record]) -> str:
    """All figures as Markdown: training, then evaluation."""
    order = sorted(records, key=lambda r: [str(r.get("shape")), r.get("length", 0), r["processes"]])
    trained = [train_cells(record, records) for record in order if "shape" in record]
    evaluated = [eval_cells(record, records) for record in order if "model" in record]
    origin = {name: sorted({record[name] for record in records if name in record}) for name in ("device", *ORIGIN)}
    device, version, commits = (", ".join(names) for names in origin.values())
    text = f"{device}, torch {version}; commit {commits}.\n\n"
    columns = ("model", "step", "tokens", "rows", "at a time", "GPUs", "how", "tokens/s", "efficiency", "MFU")
    text += table((*columns, "GiB a GPU", "loss", "loss against one GPU"), trained) if trained else ""
    columns = ("model", "tokens", "GPUs", "answers", "s", "of them start", "efficiency", "start and all")
    return text + (table((*columns, "other answers"), evaluated) if evaluated else "")


def train_cells(record: Record, records: list[Record]) -> list[str]:
    step = record["step"] + ", checkpointing" * record["checkpointing"]
    count, one = record["processes"], alone(record, records)
    rows = [str(record["rows"]), str(record["batch_size"])]
    begin = [record["shape"], step, f"{record['length']:,}", *rows, str(count), record["distribution"]]
    if "failed" in record:
        return [*begin, record["failed"], *["–"] * 5]
    rate = record["tokens_per_second"]
    return [
        *begin,
        f"{rate:,.0f}",
        f"{rate / one['tokens_per_second'] / count:.0%}" if one else "–",
        "–" if record["mfu"] is None else f"{record['mfu']:.0%}",
        "–" if record["peak"] is None else f"{record['peak']:.1f}",
        f"{record['loss']:.4f}",
        f"{abs(record['loss'] / one['loss'] - 1):.1e}" if one else "–",
    ]


def eval_cells(record: Record, records: list[Record]) -> list[str]:
    count, one = record["processes"], alone(record, records)
    begin = [record["model"], f"{record['context_length']:,}", str(count)]
    if "failed" in record:
        return [*begin, record["failed"], *["–"] * 5]
    seconds, start = record["seconds"], record["start"]
    return [
        *begin,
        f"{record['answers']:,}",
        f"{seconds:.1f}",
        f"{start:.1f}",
        f"{(one['seconds'] - one['start']) / (seconds - start) / count:.0%}" if one and seconds > start else "–",
        f"{one['seconds'] / seconds / count:.0%}" if one else "–",
        str(record["different"]),
    ]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        sys.exit(2)
