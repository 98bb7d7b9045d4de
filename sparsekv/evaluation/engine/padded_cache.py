"""Evicted caches of different lengths in one batch, and attention over them.

Columns of a layer: [evicted entries | question | generated], the first two right-justified. What is padding is never
attended to, so an answer does not depend on the batch it is in. Rows of like length are attended to together, from
their first column on: a short row does not pay for a long one. After the question every step has the same shapes and
reads its column from the device, so that it can be a CUDA graph.

Shapes: B rows, H query heads, G key/value heads, S new tokens, T columns, K columns so far, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import kvpress  # noqa: F401  # wraps the attention functions that exist at its import: ours must come later
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from sparsekv.attention import repeat_heads
from sparsekv.evaluation.engine.prefill import EvictedCache, LayerEntries

PADDED_ATTENTION = "sparsekv_padded"
ALIGNMENT = 8  # columns; attention kernels copy a mask whose rows are not a multiple of this
LIKE_LENGTH = 0.8  # of the longest row; a row shorter than this is not attended to together with it


class PaddedLayer(DynamicLayer):
    """One layer of the batch, with room for all that will come.

    Parameters
    ----------
    rows : sequence of LayerEntries
    question_lengths : sequence of int
        Tokens of each row's question; they are fed at once, left-padded to the longest.
    room : int
        Columns after the evicted entries: the longest question and the tokens to generate.
    filled : Long[1]
        How many of these columns are in use; the cache's, on this layer's device.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self, rows: Sequence[LayerEntries], question_lengths: Sequence[int], room: int, filled: Tensor
    ) -> None:
        super().__init__()
        first, self.filled = rows[0].keys, filled
        heads, _, dim = first.shape
        self.lengths = [entries.keys.shape[1] for entries in rows]
        self.width = max(self.lengths)
        total = -(-(self.width + room) // ALIGNMENT) * ALIGNMENT
        self.keys, self.values = (first.new_zeros(len(rows), heads, total, dim) for _ in range(2))
        by_head = any(entries.counts is not None for entries in rows)
        real = torch.zeros(len(rows), heads if by_head else 1, total, dtype=torch.bool)
        longest = max(question_lengths)
        for row, (entries, question_length) in enumerate(zip(rows, question_lengths, strict=True)):
            length = self.lengths[row]
            own = slice(self.width - length, self.width)
            self.keys[row, :, own], self.values[row, :, own] = entries.keys, entries.values
            counts = torch.tensor([length]) if entries.counts is None else entries.counts.cpu()
            real[row, :, own] = torch.arange(length) < counts[:, None]
            real[row, :, self.width + longest - question_length :] = True
        self.real, self.columns = real.to(first.device), torch.arange(total, device=first.device)
        self.is_initialized = True

    def segments(self) -> list[tuple[slice, int]]:
        """Neighbouring rows of like length, and the first column that any of them uses."""
        found: list[tuple[int, int]] = []  # first row, longest length
        for row, length in enumerate(self.lengths):
            if not found or not LIKE_LENGTH * found[-1][1] <= length <= found[-1][1]:
                found.append((row, length))
        stops = [row for row, _ in found[1:]] + [len(self.lengths)]
        return [
            (slice(row, stop), (self.width - length) // ALIGNMENT * ALIGNMENT)
            for (row, length), stop in zip(found, stops, strict=True)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, G, S, D] new entries in place; returns all columns so far, after a step all there are room for."""
        new = key_states.shape[2]
        if new == 1:
            column = self.width + self.filled
            self.keys.index_copy_(2, column, key_states)
            self.values.index_copy_(2, column, value_states)
            return self.keys, self.values
        used = self.width + new
        self.keys[:, :, self.width : used], self.values[:, :, self.width : used] = key_states, value_states
        return self.keys[:, :, :used], self.values[:, :, :used]

    def mask(self, queries: int) -> Tensor:
        """Bool[B, 1 or G, S, K or T]: what the new tokens may see. A padding token sees itself, so that none is NaN."""
        if queries == 1:
            return (self.real & (self.columns <= self.width + self.filled))[:, :, None]
        column = self.columns[: self.width + queries]
        own = column[-queries:, None]
        return (self.real[:, :, None, : len(column)] & (column <= own)) | (column == own)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all but these rows, Long[≤ B]."""
        self.keys, self.values, self.real = self.keys[rows], self.values[rows], self.real[rows]
        self.lengths = [self.lengths[row] for row in rows.tolist()]

    def get_seq_length(self) -> int:
        """Columns of evicted entries."""
        return self.width


class PaddedCache(Cache):
    """The evicted caches of B rows as one batch: pass it as `past_key_values` and as `padded_cache`.

    The first forward pass takes the questions, each later one a token a row; call `advance` after each.

    Parameters
    ----------
    caches : sequence of EvictedCache
    question_lengths : sequence of int
    room : int
        See `PaddedLayer`.
    """

    def __init__(self, caches: Sequence[EvictedCache], question_lengths: Sequence[int], room: int) -> None:
        by_layer = list(zip(*(cache.layers for cache in caches), strict=True))
        devices = {rows[0].keys.device for rows in by_layer}
        self.filled = {device: torch.zeros(1, dtype=torch.long, device=device) for device in devices}
        self.padded = [PaddedLayer(rows, question_lengths, room, self.filled[rows[0].keys.device]) for rows in by_layer]
        super().__init__(layers=list(self.padded))

    def advance(self, columns: int) -> None:
        """Count these new columns as filled."""
        for filled in self.filled.values():
            filled += columns

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all but these rows."""
        for layer in self.padded:
            layer.keep_rows(torch.tensor(rows, device=layer.keys.device))


def padded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    padded_cache: PaddedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens over a padded cache, under transformers' contract for attention functions.

    Parameters
    ----------
    query : [B, H, S, D]
    key, value : [B, G, K, D]

    Returns
    -------
    [B, S, H, D], None
    """
    layer = padded_cache.padded[module.layer_idx]
    mask = layer.mask(query.shape[2])
    attend = _attend_step if query.shape[2] == 1 else _attend_question
    out = [
        attend(query[rows], key[rows, :, first:], value[rows, :, first:], mask[rows, ..., first:], scaling)
        for rows, first in layer.segments()
    ]
    return torch.cat(out), None


def _attend_step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """The query heads of a group as queries of one head: keys and values are read once, not repeated."""
    rows, heads, _, dim = query.shape
    grouped = query.view(rows, key.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, dim)


def _attend_question(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    heads = query.shape[1]
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    mask = mask if mask.shape[1] == 1 else repeat_heads(mask, heads)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(PADDED_ATTENTION, padded_attention)
