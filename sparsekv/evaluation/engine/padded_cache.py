"""Evicted caches of different lengths in one batch, and attention over them.

Columns of a layer: [evicted entries | question | generated], the first two right-justified. What is padding is never
attended to, so an answer does not depend on the batch it is in. Rows of like length are attended to together, from
their first column on: a short row does not pay for a long one. After the question every step has the same shapes and
reads its column from the device, so that it can be a CUDA graph.

Shapes: B rows, H query heads, G key/value heads, S new tokens, T columns, K columns so far, D head dimension.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import kvpress  # noqa: F401  # wraps the attention functions that exist at its import: ours must come later
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from sparsekv.attention import repeat_heads
from sparsekv.evaluation.engine.evicted import EvictedCache, LayerEntries

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
        self.columns = torch.arange(total, device=first.device)
        start = self.width - torch.tensor(self.lengths, device=first.device)
        places = self._places(start, heads)
        self.keys, self.values = (
            torch.cat([first.new_zeros(1, dim), *entries]).index_select(0, places).view(len(rows), heads, total, dim)
            for entries in zip(*((one.keys.reshape(-1, dim), one.values.reshape(-1, dim)) for one in rows), strict=True)
        )
        stop = start[:, None] + _counts(rows).to(first.device)
        question = self.width + max(question_lengths) - torch.tensor(question_lengths, device=first.device)
        kept = (self.columns >= start[:, None, None]) & (self.columns < stop[..., None])
        self.real = kept | (self.columns >= question[:, None, None])
        self.is_initialized = True

    def _places(self, start: Tensor, heads: int) -> Tensor:
        """Long[B · G · T]: where an entry is among those of all rows, head after head, counted from 1; 0 at padding.

        `start`, Long[B], is each row's first column.
        """
        lengths = self.width - start
        row = (heads * (lengths.cumsum(0) - lengths) - start + 1)[:, None, None]  # its first entry, less its column
        head = (torch.arange(heads, device=start.device) * lengths[:, None])[..., None]
        kept = (self.columns >= start[:, None]) & (self.columns < self.width)
        return torch.where(kept[:, None], row + head + self.columns, 0).flatten()

    def segments(self) -> list[tuple[slice, int]]:
        """Neighbouring rows that are attended to together, and the first column that any of them uses.

        A new segment begins where this row and all that follow are shorter. A short row among longer ones (presses
        with budgets for single layers) is not worth one: in a step, each segment is a kernel.
        """
        longest = list(accumulate(reversed(self.lengths), max))[::-1]  # of each row and those after it
        starts = [0]
        for row, length in enumerate(longest):
            if length < LIKE_LENGTH * longest[starts[-1]]:
                starts.append(row)
        return [
            (slice(row, stop), (self.width - longest[row]) // ALIGNMENT * ALIGNMENT)
            for row, stop in pairwise([*starts, len(longest)])
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


def _counts(rows: Sequence[LayerEntries]) -> Tensor:
    """Long[B, 1 or G] on the CPU: the entries that each row's heads keep."""
    lengths = torch.tensor([[entries.keys.shape[1]] for entries in rows])
    counted = {row: entries.counts for row, entries in enumerate(rows) if entries.counts is not None}
    if not counted:
        return lengths
    counts = lengths.repeat(1, rows[0].keys.shape[0])
    counts[list(counted)] = torch.stack(list(counted.values()))
    return counts


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
