"""`selection.later_attention` as two Triton kernels: no matrix of probabilities is ever stored.

The first finds the weight of each later query's softmax; the second visits the entries before the cut, a block at a
time, and keeps the highest probability that any of those queries gives them.

Shapes: B rows, H query heads, G key/value heads, L tokens, D head dimension.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634  # powers of 2 are cheaper than those of e
BLOCK = 64  # queries and keys of a product


def most_attention(query: Tensor, key: Tensor, scaling: float, cuts: Sequence[int]) -> list[Tensor]:
    """For each cut, the highest probability that a query of its segment gives each entry before it.

    Parameters
    ----------
    query : [B, H, L, D]
    key : [B, G, L, D]
    scaling : float
        Factor on the logits.
    cuts : sequence of int
        Ascending positions in (0, L). The segment of one ends at the next.

    Returns
    -------
    list of Float32[B, H, cut]
    """
    batch, heads, length, width = query.shape
    pairs, group, factor = batch * heads, heads // key.shape[1], scaling * LOG2_E
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    strides = (*query.stride()[:3], *key.stride()[:3])
    weights = query.new_empty(pairs, length, dtype=torch.float32)
    sizes, options = (*strides, heads, group), {"WIDTH": width, "BLOCK": BLOCK}
    found = []
    with torch.cuda.device_of(query):  # Triton launches on the current device
        blocks = triton.cdiv(length - cuts[0], BLOCK)
        _weights[(blocks, pairs)](query, key, weights, factor, cuts[0], length, *sizes, **options)
        for start, stop in itertools.pairwise([*cuts, length]):
            most = query.new_empty(batch, heads, start, dtype=torch.float32)
            blocks = triton.cdiv(start, BLOCK)
            _most[(blocks, pairs)](query, key, weights, most, factor, start, stop, length, *sizes, **options)
            found.append(most)
    return found


@triton.jit
def _block(x, places, inside, stride, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Tokens at `places`, [BLOCK, WIDTH]."""
    where = places[:, None].to(tl.int64) * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + where, mask=inside[:, None], other=0.0)


@triton.jit(do_not_specialize=["first", "length"])  # one compilation for all cuts
def _weights(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    query,
    key,
    weights,
    factor,
    first,
    length,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    heads,
    group,
    WIDTH: tl.constexpr,  # noqa: N803  # constants of a kernel are written like this
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A block of queries: the logarithm, to base 2, of the sum that divides each one's softmax."""
    pair = tl.program_id(1).to(tl.int64)
    row, head = pair // heads, pair % heads
    query += row * query_row + head * query_head
    key += row * key_row + head // group * key_head
    begin = first + tl.program_id(0) * BLOCK
    asking = begin + tl.arange(0, BLOCK)
    queries = _block(query, asking, asking < length, query_token, WIDTH)
    peak = tl.full([BLOCK], -1e30, tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.minimum(begin + BLOCK, length), BLOCK):
        place = start + tl.arange(0, BLOCK)
        keys = _block(key, place, place < length, key_token, WIDTH)
        logits = tl.dot(queries, tl.trans(keys)) * factor
        logits = tl.where(place[None, :] <= asking[:, None], logits, -1e30)
        higher = tl.maximum(peak, tl.max(logits, 1))
        weight = weight * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    tl.store(weights + pair * length + asking, peak + tl.log2(weight), mask=asking < length)


@triton.jit(do_not_specialize=["cut", "stop", "length"])
def _most(  # type: ignore[no-untyped-def]
    query,
    key,
    weights,
    most,
    factor,
    cut,
    stop,
    length,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    heads,
    group,
    WIDTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A block of entries before the cut, all seen by the queries from there to `stop`: the highest probability."""
    pair = tl.program_id(1).to(tl.int64)
    row, head = pair // heads, pair % heads
    query += row * query_row + head * query_head
    key += row * key_row + head // group * key_head
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = _block(key, place, place < cut, key_token, WIDTH)
    highest = tl.full([BLOCK], -1e30, tl.float32)  # of the logarithms
    for start in range(cut, stop, BLOCK):
        asking = start + tl.arange(0, BLOCK)
        queries = _block(query, asking, asking < stop, query_token, WIDTH)
        weight = tl.load(weights + pair * length + asking, mask=asking < stop, other=1e30)
        logits = tl.dot(queries, tl.trans(keys)) * factor - weight[:, None]
        highest = tl.maximum(highest, tl.max(logits, 0))
    tl.store(most + pair * cut + place, tl.exp2(highest), mask=place < cut)
