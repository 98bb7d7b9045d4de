"""A cache that holds fewer entries than the model has read, while `model.generate` works unchanged.

Three things differ from a stock cache. Positions go on where the text is, not where the tensors end. A mask that counts
columns of text does not fit the entries that are left, so the cache makes its own. And what to keep depends on token
ids, which a stock cache never sees. So a hook on the decoder shows the cache every forward pass before it begins.

Shapes: B rows, G key/value heads, S new tokens, n entries held, T = n + S, D head dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparsekv.anchors import real_tokens
from sparsekv.errors import require
from sparsekv.inference.entries import as_attention_mask, take
from sparsekv.models import other_layers

SERVED_ATTENTION = ("sdpa", "eager")  # the others cannot be given any mask


@dataclass
class ForwardPlan:
    """What one forward pass does to every layer, decided before it begins.

    slots : tensors [B, …, n after the pass], what is known of each entry.
    rows : tensors [B], what is known of each row.
    new, width : S and T.
    floor : the shortest length, in tokens read, that `crop` can go back to afterwards.
    before, after : Long[B, entries], the entries that stay before the new ones come, and after attention; None: all.
    """

    slots: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    new: int
    width: int
    floor: int
    before: Tensor | None = None
    after: Tensor | None = None
    served: set[int] = field(default_factory=set)


class ShrunkCache(Cache):
    """What `AnchorCache` and `PressCache` share.

    `slots` and `rows` are as in `ForwardPlan`; a forward pass that fails before its first layer changes nothing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        check_layers(model)
        decoder = model.get_decoder()
        if announce not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(announce, with_kwargs=True)
        self._forget()

    def _forget(self) -> None:
        self.seen = self.floor = 0
        self.num_rows: int | None = None
        self.slots: tuple[Tensor, ...] = ()
        self.rows: tuple[Tensor, ...] = ()
        self.plan: ForwardPlan | None = None

    @abstractmethod
    def make_plan(self, input_ids: Tensor, real: Tensor) -> tuple[ForwardPlan, Tensor | None]:
        """Decide a forward pass; changes nothing that counts before it begins.

        Parameters
        ----------
        input_ids : Long[B, S]
        real : Bool[B, S]
            False at padding.

        Returns
        -------
        The plan, and Bool[B, 1, S, T], what the new tokens see; None: what the model's own causal mask says.
        """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add [B, G, S, D] new entries to a layer; returns all that attention reads, [B, G, T, D]."""
        plan = self.plan
        told = plan is not None and layer_idx not in plan.served and plan.new == key_states.shape[2]
        if plan is None or not told:
            raise ValueError("this cache serves the model that it was made with, as past_key_values=")
        if not plan.served:
            self.slots, self.rows, self.floor = plan.slots, plan.rows, plan.floor
            self.seen += plan.new
            self.num_rows = key_states.shape[0]
        plan.served.add(layer_idx)
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer: Any = self.layers[layer_idx]
        if plan.before is not None:
            layer.keys, layer.values = (take(x, plan.before) for x in (layer.keys, layer.values))
        keys, values = layer.update(key_states, value_states)
        if plan.after is not None:
            layer.keys, layer.values = (take(x, plan.after) for x in (keys, values))
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the cache holds."""
        tensors = (tensor for layer in self.layers for tensor in (layer.keys, layer.values))
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of text read so far, padding included: the position of the next token, not the number of entries."""
        return self.seen

    def get_mask_sizes(self, cache_position: Any, layer_idx: int) -> tuple[int, int]:
        """Entries that attention will read, and the offset that puts the new ones at their true positions.

        `cache_position` is a tensor in transformers 5.2 and the number of new tokens in later versions.
        """
        new = cache_position if isinstance(cache_position, int) else cache_position.shape[0]
        waiting = self.plan is not None and not self.plan.served
        width = self.plan.width if self.plan is not None and waiting else self.held(layer_idx) + new
        return width, self.seen + new - width

    def held(self, layer_idx: int = 0) -> int:
        """Entries that a layer holds for each row, those included that pad a short row."""
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return 0 if layer is None or not layer.is_initialized else layer.keys.shape[2]

    def crop(self, max_length: int) -> None:
        """Forget the last tokens: all beyond `max_length`, or as many as a negative one says; 0 does nothing.

        Raises
        ------
        UserError
            If entries have been evicted that the shorter text would still have.
        """
        length = max_length if max_length > 0 else self.seen + max_length
        if length >= self.seen:
            return
        reason = f"entries are gone that the text had then; the shortest is {self.floor} tokens"
        require(length >= self.floor, f"crop to {length} tokens: {reason}")
        self.drop_last(self.seen - length)
        self.seen, self.plan = length, None

    def drop_last(self, count: int) -> None:
        """Remove the last `count` entries."""
        self.rows = self.rows_at(count)
        self.slots = tuple(slot[..., :-count] for slot in self.slots)
        layer: Any
        for layer in self.layers:
            # A copy: a view would hold the memory of what was removed.
            layer.keys, layer.values = layer.keys[:, :, :-count].clone(), layer.values[:, :, :-count].clone()

    def rows_at(self, count: int) -> tuple[Tensor, ...]:
        """What `rows` were before the last `count` entries came."""
        return ()

    def reset(self) -> None:
        """Forget everything."""
        self.layers.clear()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only, Long[≤ B] or Bool[B]."""
        self._change_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.slots = tuple(map(change, self.slots))
        self.rows = tuple(map(change, self.rows))
        layer: Any
        for layer in self.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
            self.num_rows = layer.keys.shape[0]


def announce(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of the decoder: let a cache of ours decide the pass, and give the model its mask."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ShrunkCache):
        return None
    name, kind = type(cache).__name__, decoder.config._attn_implementation
    require(kind in SERVED_ATTENTION, f"attn_implementation {kind}: {name} serves {' and '.join(SERVED_ATTENTION)}")
    input_ids: Any = args[0] if args else kwargs.get("input_ids")
    require(input_ids is not None, f"inputs_embeds: {name} decides by token ids; give input_ids")
    mask = kwargs.get("attention_mask")
    require(mask is None or mask.dim() == 2, f"attention_mask: {name} makes its own; give Long[batch, tokens]")
    rows, new = input_ids.shape
    same = cache.num_rows in (None, rows)
    require(same, f"{rows} rows: the cache holds {cache.num_rows}; give as many, or make a new cache")
    limit = getattr(decoder.config, "max_position_embeddings", None)
    fits = limit is None or cache.seen + new <= limit
    require(fits, f"{cache.seen} + {new} tokens: the model's positions end at {limit} (max_position_embeddings)")
    real = real_tokens(input_ids, None if mask is None else mask[:, -new:])
    if cache.seen == 0:
        _check_start(kwargs.get("position_ids"), real)
    cache.plan, shown = cache.make_plan(input_ids, real)
    return args, {**kwargs, "attention_mask": as_attention_mask(shown, decoder)}


def _check_start(position_ids: Tensor | None, real: Tensor) -> None:
    """Refuse text that does not begin where it begins, a fault of transformers 5.2 when it prefills in chunks."""
    if position_ids is not None and position_ids.dim() == 2:
        first = real.long().argmax(-1)[:, None]
        found = position_ids.expand(len(real), -1).gather(1, first)
        reason = "read the chunks with model(...), or with a later transformers"
        begins = bool(((found == 0) | (found == first)).all())
        require(begins, f"position_ids begin at {found.tolist()}, as under prefill_chunk_size: {reason}")


def check_layers(model: PreTrainedModel) -> None:
    """Refuse a model with layers whose cache is not one entry a token, or that tell distances by places in the cache.

    Raises
    ------
    UserError
    """
    config: Any = model.config
    require(not config.is_encoder_decoder, f"{config.model_type}: an encoder-decoder; give a decoder")
    recurrent = getattr(model, "_is_stateful", False)
    text = config.get_text_config(decoder=True)
    biased = text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False)
    reason = "has ALiBi, which counts the entries between; give a model with positions in its keys"
    require(not biased, f"{config.model_type}: {reason}")
    kinds = other_layers(text) or ({"state-space"} if recurrent else set())
    others = ", ".join(sorted(kinds))
    require(not others, f"{config.model_type}: has {others} layers; give a model with full attention in every layer")
