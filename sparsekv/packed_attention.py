"""Two-region attention as one flash call.

Under eviction a row falls into pieces that know nothing of each other: the queries before the first cut with their own
keys, and those of each later segment with what its cut kept, then their own. Packed end to end they are a batch of rows
of different lengths, which flash attention takes as it is.

Shapes: B batch, H query heads, G key/value heads, L tokens, D head dimension, T keys of a row's pieces together.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What torch's own `varlen_attn` and nested tensors call. The wrapper of the former, which torch 2.7 has not, takes the
# processor longer than most kernels take the GPU; the gradient of this is torch's own, in C++.
flash_attention = torch.ops.aten._flash_attention_forward


def packs(query: Tensor, dropout: float) -> bool:
    """Whether flash attention can take queries [B, H, L, D] of this kind, on their device."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and dropout == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keeps: Sequence[Tensor],
    cuts: Sequence[int],
    counts: Sequence[int],
    scaling: float | None,
    even: bool,
) -> Tensor:
    """`attention.two_region_attention` of [B, H, L, D] queries, for what `packs`: its arguments, its result."""
    batch, groups, length, width = key.shape
    if even:
        pieces = _pieces(batch, length, tuple(cuts), tuple(counts), query.device)
        index = packed_index(keeps, cuts, counts, length).transpose(1, 2)[..., None].expand(-1, -1, -1, width)
        keys, values = (x.transpose(1, 2).gather(1, index).flatten(0, 1) for x in (key, value))
        queries = query.transpose(1, 2).flatten(0, 1)  # [B·L, H, D]
    else:  # every key/value head as a row of its own, as long as it is
        pieces = _uneven_pieces(keeps, cuts, length)
        index = packed_index_uneven(keeps, cuts, counts, length)
        keys, values = (x.flatten(0, 2).index_select(0, index)[:, None] for x in (key, value))
        queries = query.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2)  # [B·G·L, H/G, D]
    out: Tensor = flash_attention(
        queries,
        keys,
        values,
        pieces.query_starts,
        pieces.key_starts,
        pieces.most_queries,
        pieces.most_keys,
        0.0,  # dropout
        True,  # causal, aligned at the last token of each piece
        False,  # no debug mask
        scale=scaling,
    )[0]
    if even:
        return out.unflatten(0, (batch, length)).transpose(1, 2)
    return out.unflatten(0, (batch, groups, length)).transpose(2, 3).flatten(1, 2)


def packed_index(keeps: Sequence[Tensor], cuts: Sequence[int], counts: Sequence[int], length: int) -> Tensor:
    """Where the keys of the pieces stand in their row, piece after piece: Long[B, G, T], ascending within a piece.

    Parameters
    ----------
    keeps : sequence of Bool[B, G, cut_j]
        With `counts[j]` True a head.
    cuts, counts : sequences of int
    length : int
        L.
    """
    seen = _seen(keeps, cuts, length)
    return _places_of(seen, _positions((*cuts, length), seen.device), length + sum(counts))


def packed_index_uneven(keeps: Sequence[Tensor], cuts: Sequence[int], counts: Sequence[int], length: int) -> Tensor:
    """The same where heads keep unlike numbers, `counts[j]` on average: Long[B·G·T], into B·G·L keys end to end."""
    seen = _seen(keeps, cuts, length).flatten(0, 1)
    rows = torch.arange(len(seen), device=seen.device)[:, None] * length
    positions = rows + _positions((*cuts, length), seen.device)
    return _places_of(seen.flatten(), positions.flatten(), len(seen) * (length + sum(counts)))


def _seen(keeps: Sequence[Tensor], cuts: Sequence[int], length: int) -> Tensor:
    """Bool[B, G, Σ stops]: which of the positions 0 … stop each piece sees, piece after piece."""
    own = _ones(length, keeps[0].device).expand(*keeps[0].shape[:2], -1)
    parts = [own[..., : cuts[0]]]
    for keep, (cut, stop) in zip(keeps, itertools.pairwise([*cuts, length]), strict=True):
        parts += [keep, own[..., cut:stop]]
    return torch.cat(parts, dim=-1)


def _places_of(seen: Tensor, positions: Tensor, size: int) -> Tensor:
    """The positions of what is seen, Long[…, size], whose number is known without asking the GPU."""
    slot = torch.where(seen, seen.cumsum(-1) - 1, size)  # the last takes whatever is not seen
    index = slot.new_empty(*slot.shape[:-1], size + 1)
    return index.scatter_(-1, slot, positions.expand_as(slot))[..., :size]


class _Pieces(NamedTuple):
    """Where the pieces of all rows begin: Int32[pieces + 1] each; and the longest."""

    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int


@functools.lru_cache(maxsize=8)  # the same in every layer
@torch.inference_mode(False)  # what is made in there could not be used outside
def _pieces(batch: int, length: int, cuts: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> _Pieces:
    queries = [stop - start for start, stop in itertools.pairwise([0, *cuts, length])]
    keys = [own + kept for own, kept in zip(queries, (0, *counts), strict=True)]
    query_starts, key_starts = (
        torch.tensor([0, *itertools.accumulate(sizes * batch)], dtype=torch.int32, device=device)
        for sizes in (queries, keys)
    )
    return _Pieces(query_starts, key_starts, max(queries), max(keys))


def _uneven_pieces(keeps: Sequence[Tensor], cuts: Sequence[int], length: int) -> _Pieces:
    """Of rows that are heads; how many keys each has, only the GPU knows."""
    device, rows = keeps[0].device, keeps[0].shape[:2].numel()
    nothing = _pieces(rows, length, tuple(cuts), (0,) * len(cuts), device)  # kept: the queries' own keys alone
    kept = torch.stack([keep.sum(-1, dtype=torch.int32) for keep in keeps], dim=-1)  # [B, G, cuts]
    kept = F.pad(kept, (1, 0)).flatten().cumsum(0, dtype=torch.int32)  # none before the first cut
    key_starts = nothing.key_starts + F.pad(kept, (1, 0))
    return nothing._replace(key_starts=key_starts, most_keys=length)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _ones(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, dtype=torch.bool, device=device)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _positions(stops: tuple[int, ...], device: torch.device) -> Tensor:
    """Long[Σ stops]: positions 0 … stop of each piece, kept or not, end to end."""
    return torch.cat([torch.arange(stop, device=device) for stop in stops])
