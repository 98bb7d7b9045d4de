"""Attention under eviction: the two-region path against plain causal, a dense mask and FlexAttention.

    python benchmarks/attention.py                     # a GPU: 32 heads over 8 KV heads of 128, bfloat16, one row
    python benchmarks/attention.py --device cpu        # a smoke run with tiny shapes, without FlexAttention
    … --doc docs/performance.md                        # write the figures there

Forward and backward pass. Four cuts, each in the middle of where training draws it; every KV head keeps a random sample
of its own at each. Making the mask belongs to the time, as in training, where every layer keeps other entries.
Differences are the largest of output and gradients to those of the dense mask, relative to the largest of those.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from dense_reference import random_keep
from step_costs import out_of_memory, synchronized
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparsekv.attention import causal_attention, dense_attention, two_region_attention, two_region_mask
from sparsekv.files import fill_block
from sparsekv.training.flash_kernels import torch_version, use_newest
from sparsekv.version import commit

SHAPES = {"cuda": (32, 8, 128, torch.bfloat16), "cpu": (4, 2, 16, torch.float32)}  # heads, KV heads, width
LENGTHS = {"cuda": [4096, 8192, 32_768], "cpu": [256]}
CUTS = (0.375, 0.525, 0.675, 0.825)  # of the row
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; default: 4,096, 8,192 and 32,768 on a GPU")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.1, 0.3, 0.6, 1.0], help="shares of a context")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--doc", type=Path, help="Markdown file whose block for this device is replaced")
    options = parser.parse_args()
    heads, groups, width, _ = SHAPES[options.device]
    use_newest(heads, groups, width, torch.device(options.device))
    rows = []
    for length in options.lengths or LENGTHS[options.device]:
        for keep in options.keeps:
            rows += compare(options, length, keep)
    text = table(options, rows)
    print(text)
    if options.doc:
        fill_block(options.doc, f"attention {options.device}", text)


def compare(options: argparse.Namespace, length: int, keep: float) -> list[list[str]]:
    """Cells of one row a contender; the dense mask runs first, and is what the others are compared with."""
    torch.manual_seed(0)
    heads, groups, width, dtype = SHAPES[options.device]
    device = torch.device(options.device)
    tensors = [
        torch.randn(1, count, length, width, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, groups, groups)
    ]
    cuts = [round(share * length) for share in CUTS]
    keeps = [random_keep((1, groups, cut), keep, device) for cut in cuts]
    rows, reference = [], None
    for name, attend in contenders(options.device, keeps, cuts).items():
        try:
            results = forward_backward(attend, tensors)
            cells = measure(partial(forward_backward, attend, tensors), options)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            results, cells = None, ["out of memory", "–"]
        gc.collect()
        torch.cuda.empty_cache()
        reference = results if name == "dense mask" else reference
        off = "–" if name == "causal" or None in (reference, results) else f"{difference(results, reference):.1e}"
        rows.append([name, f"{length:,}", f"{keep:.0%}", *cells, off])
        print(" | ".join(rows[-1]), flush=True)
    return rows


def contenders(device: str, keeps: Sequence[Tensor], cuts: Sequence[int]) -> dict[str, Attend]:
    counts = [int(keep[0, 0].sum()) for keep in keeps]

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dense_attention(query, key, value, two_region_mask(keeps, cuts, query.shape[2]), None)

    def two_region(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return two_region_attention(query, key, value, keeps, cuts, counts, None)

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value, None, 0.0)

    found = {"dense mask": dense, "causal": causal, "two-region": two_region}
    return found | {"FlexAttention": partial(flex, keeps, cuts)} if device == "cuda" else found


def flex(keeps: Sequence[Tensor], cuts: Sequence[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same mask as a function of positions, which FlexAttention turns into a block mask."""
    heads, length = query.shape[1:3]
    shared = heads // key.shape[1]
    segment = torch.bucketize(
        torch.arange(length, device=query.device), torch.tensor(cuts, device=query.device), right=True
    )
    start = torch.tensor([0, *cuts], device=query.device)[segment]
    kept = torch.zeros(1, key.shape[1], 1 + len(cuts), length, dtype=torch.bool, device=query.device)
    for number, keep in enumerate(keeps, start=1):
        kept[:, :, number, : keep.shape[2]] = keep

    def allowed(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k >= start[q]) | kept[row, head // shared, segment[q], k])

    mask = compiled_block_mask(allowed, 1, heads, length, length, device=query.device)
    return compiled_flex(query, key, value, block_mask=mask, enable_gqa=True)


compiled_block_mask = torch.compile(create_block_mask, dynamic=False)
compiled_flex = torch.compile(flex_attention, dynamic=False)


def forward_backward(attend: Attend, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output, and the gradients of its product with itself."""
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, out.detach())]


def measure(step: Callable[[], object], options: argparse.Namespace) -> list[str]:
    """Mean ms of a step, and peak GiB above what there was."""
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = synchronized()
    for _ in range(options.repeats):
        step()
    milliseconds = 1000 * (synchronized() - start) / options.repeats
    memory = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}" if options.device == "cuda" else "–"
    return [f"{milliseconds:.2f}", memory]


def difference(results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    pairs = zip(results, reference, strict=True)
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


def table(options: argparse.Namespace, rows: list[list[str]]) -> str:
    """The figures as Markdown."""
    on_gpu = options.device == "cuda"
    heads, groups, width, dtype = SHAPES[options.device]
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    columns = ("attention", "tokens", "kept", "ms", "peak GiB", "difference")
    lines = [columns, ["---"] * len(columns), *rows]
    return (
        f"Forward and backward, {heads} heads over {groups} of {width}, {str(dtype).removeprefix('torch.')}, one row, "
        f"{len(CUTS)} cuts, {where}, torch {torch_version()}; mean of {options.repeats}; "
        f"commit {commit() or 'unknown'}.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    )


if __name__ == "__main__":
    main()
