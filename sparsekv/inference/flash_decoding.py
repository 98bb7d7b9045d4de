"""Attention of one new token a row, as a Triton kernel: each key/value head is read once, and filled slots only.

The query heads that share a key/value head are the rows of one matrix product. The slots of a row are split between
programs, whose parts a second kernel weighs and adds (flash-decoding, https://pytorch.org/blog/flash-decoding). How
many slots are filled is read on the device, so that the kernels can be part of a CUDA graph while rows grow.

Shapes: B rows, H query heads, G key/value heads, N slots, D head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 4  # for each multiprocessor, about: enough to hide latency, and the last ones to end waste little
MOST_PARTS = 64
TILE_BYTES = 16384  # of keys, and as many of values: three stages of both fit twice into shared memory


def flash_decoding(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scaling: float) -> Tensor:
    """Attention of [B, H, 1, D] queries over the first `counts` slots of each row.

    Parameters
    ----------
    keys, values : [B, G, N, D], contiguous
    counts : Long[B]
        At least 1.
    scaling : float
        Factor on the logits.

    Returns
    -------
    [B, 1, H, D]
    """
    rows, heads, _, dim = query.shape
    shared, size = keys.shape[1], keys.shape[2]
    pairs, group = rows * shared, heads // shared
    wide = max(16, triton.next_power_of_2(dim))
    block = min(128, max(16, TILE_BYTES // (wide * keys.element_size())))
    parts = max(1, min(MOST_PARTS, PROGRAMS * _multiprocessors(query) // pairs, triton.cdiv(size, block)))
    out = query.new_empty(rows, 1, heads, dim)
    sums = query.new_empty(pairs, parts, group, dim, dtype=torch.float32)
    peaks, weights = query.new_empty(2, pairs, parts, group, dtype=torch.float32)
    _part[(pairs, parts)](
        query.reshape(pairs, group, dim).contiguous(),
        keys,
        values,
        counts,
        sums,
        peaks,
        weights,
        scaling * 1.4426950408889634,  # powers of 2 are cheaper than those of e
        size,
        shared,
        GROUP=group,
        DIM=dim,
        ROWS=max(16, triton.next_power_of_2(group)),  # the least that a matrix product takes
        WIDE=wide,
        BLOCK=block,
        PARTS=parts,
        num_warps=4,
        num_stages=3,
    )
    _whole[(pairs * group,)](
        sums, peaks, weights, out, GROUP=group, DIM=dim, WIDE=wide, PARTS=parts, POWER=triton.next_power_of_2(parts)
    )
    return out


def _multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's GPU; where Triton interprets kernels on a CPU, as few as make several parts."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


@triton.jit
def _part(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    query,
    keys,
    values,
    counts,
    sums,
    peaks,
    weights,
    scaling,
    size,
    shared,
    GROUP: tl.constexpr,  # noqa: N803  # constants of a kernel are written like this
    DIM: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
):
    """One key/value head of one row, one part of its slots: the softmax's sums, not yet divided by its weights."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + pair // shared).to(tl.int32)
    span = tl.cdiv(tl.cdiv(count, PARTS), BLOCK) * BLOCK
    stop = tl.minimum(count, (part + 1) * span)
    row, dim, offset = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, BLOCK)
    real = (row < GROUP)[:, None] & (dim < DIM)[None, :]
    place = row[:, None] * DIM + dim[None, :]
    asked = tl.load(query + pair * GROUP * DIM + place, mask=real, other=0.0)
    keys += pair * size * DIM
    values += pair * size * DIM
    peak = tl.full([ROWS], -1e30, tl.float32)  # finite: a part without slots weighs nothing, and not NaN
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(part * span, stop, BLOCK):
        slot = start + offset
        inside = (slot < stop)[:, None] & (dim < DIM)[None, :]
        where = slot[:, None].to(tl.int64) * DIM + dim[None, :]
        key = tl.load(keys + where, mask=inside, other=0.0)
        logits = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
        logits = tl.where((slot < stop)[None, :], logits, -1e30)
        higher = tl.maximum(peak, tl.max(logits, 1))
        share, fade = tl.exp2(logits - higher[:, None]), tl.exp2(peak - higher)
        value = tl.load(values + where, mask=inside, other=0.0)
        total = total * fade[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        weight = weight * fade + tl.sum(share, 1)
        peak = higher
    at = pair * PARTS + part
    tl.store(sums + at * GROUP * DIM + place, total, mask=real)
    tl.store(peaks + at * GROUP + row, peak, mask=row < GROUP)
    tl.store(weights + at * GROUP + row, weight, mask=row < GROUP)


@triton.jit
def _whole(  # type: ignore[no-untyped-def]
    sums,
    peaks,
    weights,
    out,
    GROUP: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    POWER: tl.constexpr,  # noqa: N803
):
    """One query head of one row: its parts, by their weights."""
    head = tl.program_id(0).to(tl.int64)
    part, dim = tl.arange(0, POWER), tl.arange(0, WIDE)
    at = (head // GROUP * PARTS + part) * GROUP + head % GROUP
    peak = tl.load(peaks + at, mask=part < PARTS, other=-1e30)
    share = tl.exp2(peak - tl.max(peak, 0))
    weight = tl.load(weights + at, mask=part < PARTS, other=0.0)
    real = (part < PARTS)[:, None] & (dim < DIM)[None, :]
    parts = tl.load(sums + at[:, None] * DIM + dim[None, :], mask=real, other=0.0)
    whole = tl.sum(parts * share[:, None], 0) / tl.sum(weight * share, 0)
    tl.store(out + head * DIM + dim, whole, mask=dim < DIM)
