"""Attention over entries that lie in tensors of a fixed size: row b of the batch has its entries in the first slots.

One operation writes the new entries and attends, and finds the tensors of its layer by itself. So `torch.compile` sees
no cache: what it compiles does not depend on how many slots there are, and one compilation serves every layer.

Shapes: B rows, H query heads, G key/value heads, S new tokens, N slots, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache

from sparsekv.kernels import works

STATIC_ATTENTION = "sparsekv_static"

Entries = Sequence[tuple[Tensor, Tensor]]  # of each layer: keys and values, [B, G, N, D]


class StaticPass(NamedTuple):
    """What one forward pass writes and reads, the same in every layer.

    entries : of each layer
    rows : Long[B, 1], the numbers of the rows
    slots : Long[B, S], where the new entries go; those of padding go into the last slot, which is never read
    counts : Long[B], the slots that a row's last token sees
    mask : Bool[B, 1, S, N], the slots that each token sees; None where each row has one and a kernel goes by `counts`
    """

    entries: Entries
    rows: Tensor
    slots: Tensor
    counts: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, entries: Entries, lengths: Tensor, real: Tensor) -> StaticPass:
        """The pass of new tokens, False in Bool[B, S] `real` at padding, over Long[B] `lengths` entries held."""
        size = entries[0][0].shape[2]
        seen = lengths[:, None] + real.cumsum(-1)
        slots = torch.where(real, seen - 1, size - 1)
        seen = seen.clamp(min=1)  # padding before any token sees a slot of zeros, so that it is not NaN
        rows = torch.arange(len(real), device=real.device)[:, None]
        mask = None
        if real.shape[1] > 1 or not _has_kernel(entries[0][0]):
            mask = (torch.arange(size, device=real.device) < seen[..., None])[:, None]
        return cls(entries, rows, slots, seen[:, -1], mask)


def _has_kernel(keys: Tensor) -> bool:
    return keys.is_cuda and _runs(keys.device, keys.dtype, keys.shape[-1])


@functools.cache
def _runs(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    def rehearse() -> None:
        from sparsekv.inference.flash_decoding import flash_decoding

        entries = torch.zeros(1, 1, 16, dim, device=device, dtype=dtype)
        flash_decoding(entries[:, :, :1], entries, entries, torch.ones(1, dtype=torch.long, device=device), 1.0)

    return works(rehearse, "attention without a kernel of its own")


class NewEntries(Cache):
    """Hands a layer's new keys and values on to its attention, where they are written."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Nothing here may read `layer_idx`: torch.compile would compile every layer anew.
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


_active: ContextVar[StaticPass] = ContextVar("_active")


@contextmanager
def serving(config: Any, started: StaticPass) -> Iterator[None]:
    """Inside, models of this configuration attend by `started`."""
    name, token = config._attn_implementation, _active.set(started)
    config._attn_implementation = STATIC_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = name
        _active.reset(token)


def number_layers(decoder: Any) -> None:
    """Tell every attention layer its number, as a tensor: a number of Python would be compiled into the graph."""
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.static_number = torch.tensor(number)


@torch.library.custom_op("sparsekv::static_attention", mutates_args=())
def static_attention(query: Tensor, key: Tensor, value: Tensor, number: Tensor, scaling: float) -> Tensor:
    """Write the new entries of layer `number` and attend to all that its rows hold.

    Parameters
    ----------
    query : [B, H, S, D]
    key, value : [B, G, S, D]
    number : Long[], on the CPU
    scaling : float
        Factor on the logits.

    Returns
    -------
    [B, S, H, D]
    """
    now = _active.get()
    keys, values = now.entries[int(number)]
    keys[now.rows, :, now.slots] = key.transpose(1, 2)
    values[now.rows, :, now.slots] = value.transpose(1, 2)
    if now.mask is not None:
        return attend_masked(query, keys, values, now.mask, scaling)
    from sparsekv.inference.flash_decoding import flash_decoding

    return flash_decoding(query, keys, values, now.counts, scaling)


@static_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, number: Tensor, scaling: float) -> Tensor:
    rows, heads, new, dim = query.shape
    return query.new_empty(rows, new, heads, dim)


def attend_masked(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The reference: [B, H, S, D] queries over all slots, under Bool[B, 1, S, N]; returns [B, S, H, D].

    The query heads of a group are queries of one head: keys and values are not repeated.
    """
    rows, heads, new, dim = query.shape
    group = heads // keys.shape[1]
    grouped = query.reshape(rows, keys.shape[1], group * new, dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask.repeat(1, 1, group, 1), scale=scaling)
    return out.reshape(rows, heads, new, dim).transpose(1, 2).contiguous()


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' contract for attention functions; kvpress, imported later, wraps it and gives six by position."""
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.sparsekv.static_attention(query, key, value, module.static_number, factor), None


AttentionInterface.register(STATIC_ATTENTION, _attend)
