"""Time and peak memory of analysing one row, at four lengths: memory must grow with the length and not with its square.

    python benchmarks/attention_analysis.py                        # smollm2-135m, float32 on a CPU
    python benchmarks/attention_analysis.py --shape qwen3-8b       # a GPU: an 8B's shape, bfloat16, random weights
    … --doc docs/analysis.md                                       # write the figures there

Memory is counted above what the model itself takes. Each length runs in a process of its own, after a short row that
loads kernels. The tokens are random: neither time nor memory depends on them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from shapes import SHAPES, make_model
from transformers.utils.logging import disable_progress_bar

from sparsekv.analysis.head_statistics import HeadStatistics
from sparsekv.anchors import AnchorConfig
from sparsekv.files import fill_block
from sparsekv.observe import observing
from sparsekv.tokens import TokenClass
from sparsekv.version import commit

LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 8192, 16_384, 32_768)}
WARM_UP = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row; default: four, by device")
    parser.add_argument("--doc", type=Path, help="Markdown file whose block for this device is replaced")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # the length that a process of its own measures
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.shape, options.device, options.only)))
        return
    lengths = options.lengths or LENGTHS[options.device]
    text = table(options, [measure_alone(options, length) for length in lengths])
    Console().print(text, highlight=False)
    if options.doc:
        fill_block(options.doc, f"attention-memory-{'gpu' if options.device == 'cuda' else 'cpu'}", text)


def measure_alone(options: argparse.Namespace, length: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--shape", options.shape, "--device", options.device, "--only", str(length)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(shape: str, device: str, length: int) -> dict[str, Any]:
    """Analyse one row: its length, seconds, peak bytes above the model, and what they were measured on."""
    disable_progress_bar()
    model = make_model(shape, "float32" if shape == SHAPES[0] else "bfloat16", device)
    analyse(model, WARM_UP)
    before = reset_peak(device)
    start = time.perf_counter()
    analyse(model, length)
    seconds = time.perf_counter() - start
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"length": length, "seconds": seconds, "bytes": peak(device) - before, "device": name}


@torch.inference_mode()
def analyse(model: Any, length: int) -> torch.Tensor:
    """Figures of every layer and head for random tokens: Float32[layers, H, S] on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    classes = torch.randint(len(TokenClass), (length,), generator=generator).to(model.device)
    statistics, layers = HeadStatistics(length, AnchorConfig()), []

    def receive(_: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> None:
        layers.append(statistics(query, key, value, scaling, classes, classes <= TokenClass.PUNCTUATION).cpu())

    with observing(model, receive):
        model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
    return torch.stack(layers)


def reset_peak(device: str) -> int:
    """Forget the peak of memory so far; returns the bytes in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory becomes what is resident now
    return peak(device)


def peak(device: str) -> int:
    """Bytes at the peak since the last reset: of PyTorch on a GPU, of this process's resident memory on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def table(options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown, with the line through them and how far they lie from it."""
    lengths, memory = (np.array([row[name] for row in rows], dtype=float) for name in ("length", "bytes"))
    slope, intercept = np.polyfit(lengths, memory, 1)
    off = abs(memory / (intercept + slope * lengths) - 1).max()
    dtype = "float32" if options.shape == "smollm2-135m" else "bfloat16, random weights"
    lines = [
        f"| {row['length']:,} | {row['seconds']:.1f} | {row['bytes'] / 2**20:,.0f} | "
        f"{row['bytes'] / row['length'] / 2**10:,.0f} |"
        for row in rows
    ]
    return (
        f"{options.shape}, {dtype}, {rows[0]['device']}, torch {torch.__version__}; one row, forward pass included; "
        f"commit {commit() or 'unknown'}.\n\n"
        "| tokens | seconds | peak MiB above the model | KiB a token |\n| --- | --- | --- | --- |\n"
        + "\n".join(lines)
        + f"\n\nLeast squares: {intercept / 2**20:,.0f} MiB + {slope / 2**10:,.0f} KiB a token; "
        f"no length is further than {off:.0%} from that line."
    )


if __name__ == "__main__":
    main()
