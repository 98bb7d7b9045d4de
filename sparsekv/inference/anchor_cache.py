"""A cache that holds the sink, the anchors and the last tokens, and nothing else.

What is kept is known from ids and positions when a token arrives, so it is the same in every layer and head and the
tensors really shrink. Entries lie in the order of the text: those kept for good first, then the ring of the last
tokens. A row that keeps fewer than the longest is padded on the left, and the padding is masked.

Shapes: B rows, S new tokens, n entries held, T = entries that attention reads.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import require
from sparsekv.inference.entries import causal, right_justified
from sparsekv.inference.policy import AnchorPolicy
from sparsekv.inference.shrunk_cache import ForwardPlan, ShrunkCache

Rows: TypeAlias = tuple[Tensor, Tensor]  # Long[B] each: real tokens read, anchors among them


class Slots(NamedTuple):
    """What is known of entries, each [B, n].

    position : Long, counted in real tokens.
    older : Long, anchors before it, sinks not counted.
    lasting : Bool, an anchor and no sink.
    real : Bool, False where the entry pads its row.
    """

    position: Tensor
    older: Tensor
    lasting: Tensor
    real: Tensor

    def take(self, index: Tensor | None, keep: Tensor) -> Slots:
        """The entries at `index`, Long[B, m] (None: all, in their places), real where `keep`, Bool[B, n]."""
        if index is None:
            return self._replace(real=keep)
        position, older, lasting, real = (slot.gather(1, index) for slot in (*self[:3], keep))
        # Padding comes first and stays first in order.
        return Slots(position.masked_fill(~real, -1), older.masked_fill(~real, 0), lasting & real, real)

    def then(self, new: Slots) -> Slots:
        """These entries, then the new ones."""
        return Slots(*(torch.cat(pair, dim=1) for pair in zip(self, new, strict=True)))


class AnchorCache(ShrunkCache):
    """A key/value cache for `model.generate` and for `model(...)` that keeps what the anchor policy keeps.

    Parameters
    ----------
    model : PreTrainedModel
        With full attention in every layer, and `sdpa` or `eager` attention. It gets a hook that does nothing unless
        `past_key_values` is such a cache.
    tokenizer : PreTrainedTokenizerBase, optional
        The model's; it says which ids are anchors.
    anchors : AnchorConfig
        Which tokens are anchors; how many first and last ones are kept.
    mode : "prefill" or "streaming"
        prefill: the context attends fully and is evicted once, at its end; what comes later is all kept. This is what
        an adapter is trained for. streaming: every token sees the sink, the last `recent_size` tokens (itself among
        them) and the anchors before, however the text is cut into forward passes.
    budget : int, optional
        Most tokens kept of the context (prefill), or at any time (streaming): the oldest anchors leave first.
    context_length : int, optional
        Where the context ends, in columns of the batch; with mode prefill only. None: with the first forward pass.
    selector : AnchorSelector, optional
        Taken as it is, instead of one made of `tokenizer`, `anchors` and the model's configurations.

    Raises
    ------
    UserError
        For options that do not fit each other, and for a model with layers that it cannot serve. Later, before the
        cache is touched: for text beyond the model's positions, another number of rows, or a crop of what is gone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        anchors: AnchorConfig | None = None,
        *,
        mode: Literal["prefill", "streaming"] = "prefill",
        budget: int | None = None,
        context_length: int | None = None,
        selector: AnchorSelector | None = None,
    ) -> None:
        require(mode in ("prefill", "streaming"), f"mode {mode!r}: must be prefill or streaming")
        given = context_length is not None
        require(not given or mode == "prefill", f"context_length {context_length}: there is none in mode {mode}")
        require(context_length is None or context_length > 0, f"context_length {context_length}: must be 1 or more")
        if selector is None:
            require(tokenizer is not None, "AnchorCache: give a tokenizer or a selector")
            assert tokenizer is not None
            selector = AnchorSelector(anchors or AnchorConfig(), tokenizer, model.config, model.generation_config)
        self.policy = AnchorPolicy.of(selector.config, budget)
        self.selector, self.mode, self.context_length = selector, mode, context_length
        super().__init__(model)

    def _forget(self) -> None:
        super()._forget()
        self.cut = self.context_length or 0

    @property
    def kept(self) -> Tensor:
        """Long[B]: entries of each row, without those that pad it; of an empty cache Long[0]."""
        return Slots(*self.slots).real.sum(-1) if self.slots else torch.zeros(0, dtype=torch.long)

    def make_plan(self, input_ids: Tensor, real: Tensor) -> tuple[ForwardPlan, Tensor | None]:
        """What the pass sees and what stays after it, from the ids alone."""
        new, rows = self._describe(input_ids, real)
        held = Slots(*self.slots) if self.slots else Slots(*(slot[:, :0] for slot in new))
        plan = self._stream if self.mode == "streaming" else self._prefill
        return plan(held, new, rows)

    def _describe(self, input_ids: Tensor, real: Tensor) -> tuple[Slots, Rows]:
        """The new tokens, and each row's tokens and anchors after them."""
        tokens, anchors = self.rows or (input_ids.new_zeros(len(input_ids)),) * 2
        position = tokens[:, None] + real.cumsum(-1) - real.long()
        lasting = self.selector.classes(input_ids) & real & (position >= self.policy.sink_size)
        older = anchors[:, None] + lasting.cumsum(-1) - lasting.long()
        return Slots(position, older, lasting, real), (tokens + real.sum(-1), anchors + lasting.sum(-1))

    def _stream(self, held: Slots, new: Slots, rows: Rows) -> tuple[ForwardPlan, Tensor | None]:
        """Each token sees what the policy keeps of the text up to it; what none of them sees leaves at once."""
        count, kept_before = new.real.shape[1], held.real.shape[1]
        first = torch.minimum(
            new.position[:, :1] + 1, rows[0][:, None]
        )  # a row of nothing but padding does not move on
        keep = self._keeps(held.then(new), rows, first)[:, 0, :kept_before]
        before, floor = right_justified(keep), self.floor
        if before is not None or _any_gone(held, keep):
            floor = self.seen
        slots = held.take(before, keep).then(new)
        width = slots.real.shape[1]
        past = _past(new, width)
        mask = (self._keeps(slots, rows, new.position + 1) & past) | past.triu(width - count)  # itself, even if padding
        keep = self._keeps(slots, rows, rows[0][:, None])[:, 0]
        after = right_justified(keep)
        if after is not None or _any_gone(slots, keep):
            floor = self.seen + count
        shown = None if count == 1 and bool(mask.all()) else mask[:, None]
        return ForwardPlan(slots.take(after, keep), rows, count, width, floor, before, after), shown

    def _prefill(self, held: Slots, new: Slots, rows: Rows) -> tuple[ForwardPlan, Tensor | None]:
        """Full attention; where the context ends, later tokens see what the policy keeps of it, and the rest leaves."""
        count, slots, floor = new.real.shape[1], held.then(new), self.floor
        width = slots.real.shape[1]
        if self.seen == 0 and self.context_length is None:
            self.cut = count
        inside = self.cut - self.seen  # of the new tokens, the context's
        mask, keep = causal(held.real[:, None], new.real), slots.real
        if 0 < inside <= count:
            context = (rows[0] - new.real[:, inside:].sum(-1))[:, None]
            keep = self._keeps(slots, rows, context)[:, 0] | (slots.real & (slots.position >= context))
        gone = _any_gone(slots, keep)
        if gone and inside < count:
            past = _past(new, width)
            mask = past.expand(len(keep), 1, -1, -1).clone() if mask is None else mask
            mask[:, :, inside:] &= keep[:, None, None] | past.triu(width - count)[inside:]
        after = right_justified(keep)
        if after is not None or gone:
            # All that came after the context is there, and in the same columns of every row, unless some of it pads.
            floor = self.cut if 0 < inside <= count and bool(new.real[:, inside:].all()) else self.seen + count
        return ForwardPlan(slots.take(after, keep), rows, count, width, floor, after=after), mask

    def _keeps(self, slots: Slots, rows: Rows, contexts: Tensor) -> Tensor:
        """Bool[B, C, n]: what the policy keeps of each of the contexts, Long[B, C] in real tokens."""
        position, older, lasting, real = (slot[:, None] for slot in slots)
        older_than_ring = None
        if self.policy.budget is not None:
            first = torch.searchsorted(slots.position, contexts - self.policy.recent_size)  # of the ring
            older_than_ring = torch.cat([slots.older, rows[1][:, None]], dim=1).gather(1, first)[..., None]
        return real & self.policy.keeps(position, lasting, contexts[..., None], older, older_than_ring)

    def rows_at(self, count: int) -> Rows:
        """Each row's tokens and anchors before the last `count` entries."""
        slots = Slots(*self.slots)
        return slots.position[:, -count], slots.older[:, -count]


def _any_gone(slots: Slots, keep: Tensor) -> bool:
    """Whether an entry is real and not kept."""
    return bool((slots.real & ~keep).any())


def _past(new: Slots, width: int) -> Tensor:
    """Bool[S, T]: the last S of T columns are the queries, and each sees itself and what lies before."""
    count = new.real.shape[1]
    return torch.ones(count, width, dtype=torch.bool, device=new.real.device).tril(width - count)
