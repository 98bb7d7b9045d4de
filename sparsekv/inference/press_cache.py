"""A cache without what a press evicts: the tensors shrink, whatever the press and however it chose.

A press that chooses for every head alone only marks entries; here each head is gathered on its own and padded to the
longest of its layer, and that padding counts as memory.

Shapes: B rows, G key/value heads, H query heads, C context tokens, S new tokens, n entries held.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpress import (
    BasePress,
    CompressionRatioDecodingPress,
    DecodingPress,
    FinchPress,
    KeyRerotationPress,
    PrefillDecodingPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv.attention import repeat_heads
from sparsekv.errors import require
from sparsekv.inference.entries import as_attention_mask, causal, right_justified, take
from sparsekv.inference.shrunk_cache import ForwardPlan, ShrunkCache
from sparsekv.presses import needs_eager, why_not, without_waiting
from sparsekv.presses.parameters import nested

_WHILE_DECODING = (DecodingPress, PrefillDecodingPress, CompressionRatioDecodingPress)


class PressCache(ShrunkCache):
    """The cache of contexts after a press, for `model.generate` and for `model(...)`; what comes later is all kept.

    Make one with `PressCache.prefill`. `slots` has Bool[B, G, n] for each layer: False where an entry pads its head.
    """

    @classmethod
    @torch.inference_mode()
    def prefill(cls, model: PreTrainedModel, input_ids: Tensor, press: BasePress) -> PressCache:
        """Read contexts with full attention and evict them by a press.

        Parameters
        ----------
        model : PreTrainedModel
            With full attention in every layer, and `sdpa` or `eager` attention.
        input_ids : Long[B, C]
            Contexts of one length; presses know of no padding.
        press : BasePress
            Of kvpress or of `sparsekv.presses.make_press`, one that acts on the prefill.

        Raises
        ------
        UserError
            For a press that acts while decoding, moves keys to other positions, adds entries of its own or cannot run
            on this model (`sparsekv.presses.why_not`), and for a model with layers that cannot be served.
        """
        _check(press, model)
        cache, decoder, before = cls(model), model.get_decoder(), DynamicCache()
        limit = getattr(decoder.config, "max_position_embeddings", None)
        rows, length = input_ids.shape
        fits = limit is None or length <= limit
        require(fits, f"{length} tokens: the model's positions end at {limit} (max_position_embeddings)")
        position = torch.arange(length, device=model.device)
        with without_waiting(press)(model):  # kvpress reads cache_position, which transformers ≥ 5.3 no longer makes
            decoder(input_ids=input_ids.to(model.device), past_key_values=before, cache_position=position)
        real = []
        layer: Any
        for module, layer in zip(decoder.layers, before.layers, strict=True):
            require(layer.keys.shape[2] <= length, f"{type(press).__name__}: adds entries of its own")
            real.append(_shrink(layer, _unmarked(module.self_attn, layer.keys)))
        cache.layers, cache.slots = before.layers, tuple(real)
        cache.seen = cache.floor = length
        cache.num_rows = rows
        return cache

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        for layer in model.get_decoder().layers:
            if give_mask not in layer.self_attn._forward_pre_hooks.values():
                layer.self_attn.register_forward_pre_hook(give_mask, with_kwargs=True)

    @property
    def kept(self) -> Tensor:
        """Long[B]: entries of each row, over all layers and heads, without those that pad a head."""
        return torch.stack([real.sum((1, 2)) for real in self.slots]).sum(0)

    def make_plan(self, input_ids: Tensor, real: Tensor) -> tuple[ForwardPlan, Tensor | None]:
        """Keep all that is new; each layer has a mask of its own, see `give_mask`."""
        require(bool(self.slots), "PressCache: holds no context; make one with PressCache.prefill")
        new = real.shape[1]
        slots = tuple(torch.cat([held, real[:, None].expand(-1, held.shape[1], -1)], dim=2) for held in self.slots)
        return ForwardPlan(slots, (), new, self.held() + new, self.floor), None

    def layer_mask(self, layer_idx: int) -> Tensor | None:
        """Bool[B, G, S, n + S]: what the new tokens see in a layer; None: what a causal mask says."""
        assert self.plan is not None
        new = self.plan.new
        whole = self.plan.slots[layer_idx]
        return causal(whole[..., :-new], whole[:, 0, -new:])


def give_mask(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of an attention layer: give it the mask of its own entries."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PressCache):
        return None
    mask = cache.layer_mask(attention.layer_idx)
    mask = None if mask is None else repeat_heads(mask, attention.config.num_attention_heads)
    return args, {**kwargs, "attention_mask": as_attention_mask(mask, attention)}


def _check(press: BasePress, model: PreTrainedModel) -> None:
    """Refuse what would give a cache of another kind."""
    name, parts = type(press).__name__, list(nested(press))
    decoding = any(isinstance(part, _WHILE_DECODING) for part in parts)
    require(not decoding, f"{name}: acts while decoding; give a press of the prefill")
    moves = any(isinstance(p, KeyRerotationPress) or (isinstance(p, FinchPress) and p.rerotate_keys) for p in parts)
    require(not moves, f"{name}: moves keys to other positions; give a press that leaves them")
    eager = model.config._attn_implementation == "eager"
    require(eager or not needs_eager(press), f"{name}: reads attention weights; load with attn_implementation eager")
    reason = why_not(press, model)
    require(reason is None, str(reason))


def _unmarked(attention: Any, keys: Tensor) -> Tensor:
    """Bool[B, G, n]: False where a press has marked an entry as evicted; it is marked no longer."""
    real = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    marked = getattr(attention, "masked_key_indices", None)
    if marked is not None:
        real[tuple(index.to(keys.device) for index in marked)] = False
        attention.masked_key_indices = None
    return real


def _shrink(layer: Any, real: Tensor) -> Tensor:
    """Remove a layer's entries that are not real; returns Bool[B, G, longest], real without them."""
    index = right_justified(real)
    if index is None:
        # A press may leave a view of all that it read.
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return real
    layer.keys, layer.values = take(layer.keys, index), take(layer.values, index)
    return real.gather(2, index)
