"""Attention under eviction: which keys a query may see, and two ways to compute it.

The contract of the whole package is `keep`: Bool[batch, kv_head, context], the context entries of one layer that
survive a cut. This file turns `keep` into attention. The dense functions are the reference; `two_region_attention` is
the fast path and must equal them in values and gradients.

Shapes: B batch, H query heads, G key/value heads, L tokens, D head dimension, C = cut, n = entries kept.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from sparsekv.packed_attention import packed_attention, packs


def two_region_mask(keeps: Sequence[Tensor], cuts: Sequence[int], length: int) -> Tensor:
    """Allowed pairs when the cache is evicted at each cut, as at inference.

    With one cut: allowed(q, k) = (k ≤ q) and (q < cut or k ≥ cut or keep[k]). With several, the queries of segment j,
    [cut_j, cut_j+1), see keep_j of [0, cut_j) and their own segment.

    Parameters
    ----------
    keeps : sequence of Bool[B, G, cut_j]
        What survives each cut.
    cuts : sequence of int
        Ascending positions in (0, length).
    length : int
        Tokens in the sequence.

    Returns
    -------
    Bool[B, G, length, length]
        True where query (dim 2) may attend to key (dim 3).
    """
    batch, heads, _ = keeps[0].shape
    causal = torch.ones(length, length, dtype=torch.bool, device=keeps[0].device).tril()
    mask = causal.repeat(batch, heads, 1, 1)
    for keep, start, stop in zip(keeps, cuts, [*cuts[1:], length], strict=True):
        mask[:, :, start:stop, :start] = keep[:, :, None, :]
    return mask


def global_mask(keep: Tensor) -> Tensor:
    """Allowed pairs when dropped keys are hidden from every query, themselves included (the original EIT method).

    Not what any press does at inference; kept for comparison. `keep` is Bool[B, G, L]; returns Bool[B, G, L, L].
    """
    causal = torch.ones(keep.shape[-1], keep.shape[-1], dtype=torch.bool, device=keep.device).tril()
    return causal & keep[:, :, None, :]


def streaming_mask(keep: Tensor, recent_size: int) -> Tensor:
    """Allowed pairs when every query keeps its own recent window besides `keep`.

    Query q sees k ≤ q when k > q − recent_size (the window, itself included) or keep[k]: what a cache sees that drops
    a token when it leaves the window. `keep` is Bool[B, G, L]; returns Bool[B, G, L, L].
    """
    position = torch.arange(keep.shape[-1], device=keep.device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & ((distance < max(recent_size, 1)) | keep[:, :, None, :])


def combine_masks(allowed: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Allowed pairs that the model's own mask also allows.

    Parameters
    ----------
    allowed : Bool[B, G, L, L]
    attention_mask : Bool or float [B, 1, L, L], optional
        The model's mask: True/0 where attending is allowed, False/a large negative number elsewhere.

    Returns
    -------
    Bool[B, G, L, L]
        A query with nothing left to see (padding, a dropped first token) sees itself, so that no row is NaN.
    """
    if attention_mask is not None:
        model_allows = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1.0
        allowed = allowed & model_allows[..., : allowed.shape[-1]]
    alone = ~allowed.any(-1, keepdim=True)
    return allowed | (alone & torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device))


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, G, …] → [B, num_heads, …]: every key/value head repeated for the query heads that share it."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """Reference: attention of [B, H, L, D] queries over [B, G, L, D] keys under a Bool[B, G or H, L, L] mask."""
    heads = query.shape[1]
    key, value, mask = (repeat_heads(x, heads) for x in (key, value, mask))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def kept_indices(keep: Tensor, count: int) -> Tensor:
    """Positions of the kept entries, ascending: Bool[B, G, C] with `count` True a head → Long[B, G, count]."""
    return keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]


def two_region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keeps: Sequence[Tensor],
    cuts: Sequence[int],
    counts: Sequence[int],
    scaling: float | None,
    dropout: float = 0.0,
    even: bool = True,
) -> Tensor:
    """Fast path: plain causal attention before the first cut, gathered keys after it; no dense mask on a GPU.

    All of it is one flash call where that is possible (`packed_attention.py`), otherwise a call for each segment, or
    dense attention where heads keep unlike numbers.

    Equal to `dense_attention` under `two_region_mask` when every head and row of `keeps[j]` keeps `counts[j]` entries
    (on average over a row's heads, unless `even`) and there is no padding. Work shrinks as more is evicted.

    Parameters
    ----------
    query : [B, H, L, D]
    key, value : [B, G, L, D]
    keeps : sequence of Bool[B, G, cut_j]
    cuts, counts : sequences of int
    scaling : float, optional
        Factor on the logits; 1/√D by default.
    dropout : float
        On the probabilities.
    even : bool
        False when the heads of a row share a budget: they keep `counts[j]` entries on average.

    Returns
    -------
    [B, H, L, D]
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in fp32 after the rotary embedding
    if packs(query, dropout):
        return packed_attention(query, key, value, keeps, cuts, counts, scaling, even)
    if not even:
        return dense_attention(query, key, value, two_region_mask(keeps, cuts, query.shape[2]), scaling, dropout)
    sizes = [stop - start for start, stop in itertools.pairwise([0, *cuts, query.shape[2]])]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))  # one backward for all slices
    index = torch.cat([kept_indices(keep, count) for keep, count in zip(keeps, counts, strict=True)], dim=-1)
    index = index[..., None].expand(-1, -1, -1, key.shape[-1])
    kept_keys, kept_values = (x.gather(2, index).split(list(counts), dim=2) for x in (key, value))
    out = [causal_attention(queries[0], keys[0], values[0], scaling, dropout)]
    for segment, kept_key, kept_value in zip(range(1, len(sizes)), kept_keys, kept_values, strict=True):
        seen_keys = torch.cat((kept_key, keys[segment]), dim=2)
        seen_values = torch.cat((kept_value, values[segment]), dim=2)
        out.append(causal_attention(queries[segment], seen_keys, seen_values, scaling, dropout))
    return torch.cat(out, dim=2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    """Causal attention aligned at the last token: query i of M sees keys up to i + N − M. One flash call on a GPU."""
    shared_heads = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)  # only flash reads shared heads
    if not shared_heads:
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=shared_heads
        )
    bias = causal_lower_right(queries, keys)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=shared_heads
    )
