"""`AnchorCache` in tensors of a fixed size: once the context is evicted, nothing grows and a step is always the same.

Shapes: B rows, S new tokens, n entries held, N slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import require
from sparsekv.inference.anchor_cache import AnchorCache, Slots
from sparsekv.inference.entries import take
from sparsekv.inference.shrunk_cache import ForwardPlan
from sparsekv.inference.static_attention import number_layers
from sparsekv.inference.static_step import StaticStep


class StaticAnchorCache(AnchorCache):
    """An `AnchorCache` of mode prefill for fast decoding: on a GPU, every step is one CUDA graph.

    The context is read and evicted as there. Then each row's entries move into the first of N slots, the longest row's
    entries and `room`, and later tokens are written behind them. The same logits, to rounding.

    Parameters
    ----------
    model : PreTrainedModel
        With `sdpa` attention, on one device. Its decoder gets a forward method that does nothing of its own unless
        `past_key_values` is such a cache.
    tokenizer, anchors, budget, context_length, selector
        As for `AnchorCache`.
    room : int
        Tokens that can come after the context, or after the forward pass in which it ends.
    compiled : bool
        Let `torch.compile` fuse what lies between attention and matrix products: steps are faster, but the first one
        with a batch size takes seconds.

    Raises
    ------
    UserError
        As `AnchorCache`; for attention other than `sdpa` and for several devices; later, for text beyond `room`, and
        for another number of rows once the context has ended.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        anchors: AnchorConfig | None = None,
        *,
        room: int,
        budget: int | None = None,
        context_length: int | None = None,
        selector: AnchorSelector | None = None,
        compiled: bool = False,
    ) -> None:
        require(room > 0, f"room {room}: must be 1 or more")
        decoder: Any = model.get_decoder()
        kind = decoder.config._attn_implementation
        require(kind == "sdpa", f"attn_implementation {kind}: StaticAnchorCache serves sdpa")
        devices = sorted({str(weight.device) for weight in decoder.parameters()})
        require(len(devices) == 1, f"a model on {', '.join(devices)}: StaticAnchorCache serves models on one device")
        super().__init__(model, tokenizer, anchors, budget=budget, context_length=context_length, selector=selector)
        self.room, self.compiled = room, compiled
        if not isinstance(decoder.forward, StaticForward):
            decoder.forward = StaticForward(decoder)

    def _forget(self) -> None:
        super()._forget()
        _steps.pop(self, None)  # it holds the tensors
        self.lengths: Tensor | None = None  # Long[B], once the context has ended
        self.later: Tensor | None = None  # Bool[B, …], then: which tokens since `floor` are real

    @property
    def is_static(self) -> bool:
        """Whether the context has ended and shapes are fixed."""
        return self.lengths is not None

    @property
    def kept(self) -> Tensor:
        """Long[B]: slots of each row that are filled."""
        return super().kept if self.lengths is None else self.lengths.clone()

    def settle(self) -> None:
        """Fix the shapes, if the context has ended: every row's entries into its first slots."""
        if self.is_static or not 0 < self.cut <= self.seen:
            return
        with torch.inference_mode(False), torch.no_grad():
            real = Slots(*self.slots).real
            order = None if bool(real.all()) else real.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
            lengths = real.sum(-1)
            slots = int(lengths.max()) + self.room + 1  # and one for padding
            layer: Any
            for layer in self.layers:
                layer.keys, layer.values = (
                    _with_room(x if order is None else take(x, order), slots) for x in (layer.keys, layer.values)
                )
            already = self.seen - self.floor
            self.later = real.new_zeros(len(real), already + self.room)
            self.later[:, :already] = real[:, real.shape[1] - already :]
        self.lengths, self.slots, self.rows = lengths, (), ()

    def make_plan(self, input_ids: Tensor, real: Tensor) -> tuple[ForwardPlan, Tensor | None]:
        """As `AnchorCache` until the context has ended; then there is nothing left to decide."""
        if self.later is None:
            return super().make_plan(input_ids, real)
        new, start = input_ids.shape[1], self.seen - self.floor
        left = self.later.shape[1] - start
        require(new <= left, f"room {self.room}: {new} more tokens where {left} fit; make a cache with more room")
        self.later[:, start : start + new] = real
        return ForwardPlan((), (), new, self.held(), self.floor), None

    def run(self, step: StaticStep, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The announced pass of Long[B, S] tokens over what is held; returns hidden states, [B, S, hidden]."""
        assert self.later is not None
        rows, new = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(self.seen, self.seen + new, device=input_ids.device)[None]
        start = self.seen - self.floor
        hidden = step(input_ids, self.later[:, start : start + new], position_ids.expand(rows, -1))
        self.seen += new
        return hidden

    def drop_last(self, count: int) -> None:
        """In place once shapes are fixed: the slots will be written again."""
        if self.lengths is None or self.later is None:
            super().drop_last(count)
        else:
            stop = self.seen - self.floor
            self.lengths -= self.later[:, stop - count : stop].sum(-1)

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """In place once shapes are fixed."""
        if self.lengths is None or self.later is None:
            super()._change_rows(change)
            return
        layers: Any = self.layers
        for held in (self.lengths, self.later, *(tensor for layer in layers for tensor in (layer.keys, layer.values))):
            changed = change(held)
            require(len(changed) == len(held), f"{len(changed)} rows: the cache holds {len(held)} for good")
            held.copy_(changed)


def _with_room(entries: Tensor, size: int) -> Tensor:
    """[B, G, n, D] → [B, G, N, D]: the same, then zeros (attention weighs them by 0, and 0 times NaN would be NaN)."""
    whole = entries.new_zeros(*entries.shape[:2], size, entries.shape[3])
    whole[:, :, : entries.shape[2]] = entries
    return whole


_steps: WeakKeyDictionary[StaticAnchorCache, StaticStep] = WeakKeyDictionary()


class StaticForward:
    """The decoder's forward pass, unless `past_key_values` is a `StaticAnchorCache` whose context has ended."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.plain = decoder, decoder.forward
        functools.update_wrapper(self, self.plain)
        number_layers(decoder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, StaticAnchorCache):
            return self.plain(*args, **kwargs)
        if not cache.is_static:
            output = self.plain(*args, **kwargs)
            cache.settle()
            return output
        asked = [name for name in ("output_attentions", "output_hidden_states") if kwargs.get(name)]
        require(not asked, f"{', '.join(asked)}: StaticAnchorCache gives logits only")
        ids = args[0] if args else kwargs["input_ids"]
        hidden: Any = cache.run(self._step(cache), ids, kwargs.get("position_ids"))
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _step(self, cache: StaticAnchorCache) -> StaticStep:
        """The cache's own, made anew where its tensors are others."""
        assert cache.lengths is not None
        step = _steps.get(cache)
        if step is None or step.lengths is not cache.lengths:
            layers: Any = cache.layers
            entries = [(layer.keys, layer.values) for layer in layers]
            step = _steps[cache] = StaticStep(self.decoder, self.plain, entries, cache.lengths, cache.compiled)
        return step
