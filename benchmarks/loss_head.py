"""Cost of the loss head, CE + KL to a teacher: the chunked loss against the plain formula on full logits.

    python benchmarks/loss_head.py                 # a GPU: 4,096 tokens × 4,096 hidden × 151,936 vocabulary, bf16
    python benchmarks/loss_head.py --compile       # also compiled, as `sparsekv train --compile` does it
    python benchmarks/loss_head.py --device cpu    # a smoke run with tiny shapes

One row a variant: median milliseconds of forward + backward to the hidden states, memory above what the inputs and the
head take (GPU only), and the largest single tensor made (not known of what is compiled).
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsekv.training.compiled import compile_logit_sums
from sparsekv.training.loss import LogitSums, distillation_loss, sums_from_logits

SHAPES = {"cuda": (4096, 4096, 151_936), "cpu": (256, 64, 4096)}  # tokens, hidden, vocabulary
CHUNKS = {"cuda": (512, 1024, 2048), "cpu": (32, 64)}


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in storages:  # a view is no new tensor
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def plain_loss(student: Tensor, teacher: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Σ CE + KL(teacher‖student) as one would write it."""
    logits = head(student).float()
    with torch.no_grad():
        log_q = F.log_softmax(head(teacher).float(), dim=-1)
    kl = F.kl_div(F.log_softmax(logits, dim=-1), log_q, reduction="sum", log_target=True)
    return F.cross_entropy(logits, labels, reduction="sum") + kl


def measure(
    loss: Callable[[], Tensor], student: Tensor, repeats: int, watch: bool
) -> tuple[float, float | None, float | None]:
    """(median ms, peak MiB above the inputs, MiB of the largest tensor) of forward + backward, warmed up.

    None: no GPU; not to `watch`.
    """
    on_gpu = student.device.type == "cuda"

    def step() -> float:
        student.grad = None
        start = time.perf_counter()
        loss().backward()
        if on_gpu:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    with LargestTensor() if watch else contextlib.nullcontext() as largest:  # what it watches, torch does not compile
        step()
    step()
    student.grad, peak = None, None
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    milliseconds = statistics.median([step() for _ in range(repeats)])
    if on_gpu:
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return milliseconds, peak, largest.bytes / 2**20 if largest else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="also each size of chunks compiled")
    options = parser.parse_args()
    device, (n, d, v) = options.device, SHAPES[options.device]

    torch.manual_seed(0)
    head = nn.Linear(d, v, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    student, teacher = torch.randn(2, n, d, device=device, dtype=torch.bfloat16)
    student.requires_grad_()
    labels = torch.randint(v, (n,), device=device)

    def chunked(chunk_size: int, logit_sums: LogitSums = sums_from_logits) -> Callable[[], Tensor]:
        options = {"chunk_size": chunk_size, "logit_sums": logit_sums}
        return lambda: distillation_loss(student, teacher, labels, head, head, **options).loss

    variants = {"plain, full logits": lambda: plain_loss(student, teacher, labels, head)}
    variants |= {f"chunks of {chunk:,}": chunked(chunk) for chunk in CHUNKS[device]}
    if options.compile:
        variants |= {f"chunks of {chunk:,}, compiled": chunked(chunk, compile_logit_sums()) for chunk in CHUNKS[device]}

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    table = Table(
        title=f"Loss head, {n:,} tokens × {d:,} hidden × {v:,} vocabulary, bf16, {name}, torch {torch.__version__}"
    )
    for column in ("variant", "ms", "peak MiB", "largest tensor MiB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant, loss in variants.items():
        milliseconds, peak, largest = measure(loss, student, options.repeats, watch="compiled" not in variant)
        memory = "–" if peak is None else f"{peak:,.0f}"
        table.add_row(variant, f"{milliseconds:.1f}", memory, "–" if largest is None else f"{largest:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
