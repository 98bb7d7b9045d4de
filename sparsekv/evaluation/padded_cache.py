"""Evicted caches of different lengths in one batch, and attention over them.

Columns of a layer: [evicted entries, left-justified | question, right-justified | generated]. What is padding is never
attended to, so an answer does not depend on the batch it is in. Layers differ in width, heads in their counts.

Shapes: B rows, H query heads, G key/value heads, S new tokens, K columns so far, D head dimension.
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
from sparsekv.evaluation.prefill import EvictedCache, LayerEntries

PADDED_ATTENTION = "sparsekv_padded"


class PaddedLayer(DynamicLayer):
    """One layer of the batch, with room for all that will come.

    Parameters
    ----------
    rows : sequence of LayerEntries
    question_lengths : sequence of int
        Tokens of each row's question; they are fed left-padded to the longest.
    room : int
        Columns after the evicted entries: the longest question and the tokens to generate.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, rows: Sequence[LayerEntries], question_lengths: Sequence[int], room: int) -> None:
        super().__init__()
        first = rows[0].keys
        heads, _, dim = first.shape
        self.width = max(entries.keys.shape[1] for entries in rows)
        self.used = self.width
        self.keys, self.values = (first.new_zeros(len(rows), heads, self.width + room, dim) for _ in range(2))
        by_head = any(entries.counts is not None for entries in rows)
        self.real = torch.zeros(len(rows), heads if by_head else 1, self.width + room, dtype=torch.bool)
        longest = max(question_lengths)
        for row, (entries, question_length) in enumerate(zip(rows, question_lengths, strict=True)):
            length = entries.keys.shape[1]
            self.keys[row, :, :length], self.values[row, :, :length] = entries.keys, entries.values
            counts = torch.tensor([length]) if entries.counts is None else entries.counts.cpu()
            self.real[row, :, :length] = torch.arange(length) < counts[:, None]
            self.real[row, :, self.width + longest - question_length :] = True
        self.real = self.real.to(first.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, G, S, D] new entries in place; returns all columns so far, [B, G, K, D]."""
        new = slice(self.used, self.used + key_states.shape[2])
        self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        self.used = new.stop
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def mask(self, queries: int) -> Tensor:
        """Bool[B, 1 or G, S, K]: what the last S tokens may see. A padding token sees itself, so that none is NaN."""
        real = self.real[:, :, None, : self.used]
        if queries == 1:
            return real
        column = torch.arange(self.used, device=real.device)
        own = column[-queries:, None]
        return (real & (column <= own)) | (column == own)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all but these rows, Long[≤ B]."""
        self.keys, self.values, self.real = self.keys[rows], self.values[rows], self.real[rows]

    def get_seq_length(self) -> int:
        """Columns so far."""
        return self.used


class PaddedCache(Cache):
    """The evicted caches of B rows as one batch: pass it as `past_key_values` and as `padded_cache`.

    Parameters
    ----------
    caches : sequence of EvictedCache
    question_lengths : sequence of int
    room : int
        See `PaddedLayer`.
    """

    def __init__(self, caches: Sequence[EvictedCache], question_lengths: Sequence[int], room: int) -> None:
        by_layer = zip(*(cache.layers for cache in caches), strict=True)
        self.padded = [PaddedLayer(rows, question_lengths, room) for rows in by_layer]
        super().__init__(layers=list(self.padded))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all but these rows."""
        index = torch.tensor(rows, device=self.padded[0].keys.device)
        for layer in self.padded:
            layer.keep_rows(index)


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
    rows, heads, queries, dim = query.shape
    groups = key.shape[1]
    mask = padded_cache.padded[module.layer_idx].mask(queries)
    if queries == 1:  # the heads of a group as queries of one head: keys and values are read once, not repeated
        grouped = query.view(rows, groups, heads // groups, dim)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(rows, 1, heads, dim), None
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    mask = mask if mask.shape[1] == 1 else repeat_heads(mask, heads)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(PADDED_ATTENTION, padded_attention)
