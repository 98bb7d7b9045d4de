"""Which entries of a context survive a cut: one rule, one `keep`.

A rule is a press of kvpress (the rule trained is the press tested) or the anchors plus a random sample. Their names
stand in `choices.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from kvpress import AdaKVPress, NonCausalAttnPress, PyramidKVPress, ScorerPress, StreamingLLMPress, TOVAPress
from kvpress.utils import compute_n_kept
from torch import Tensor, nn

from sparsekv.anchors import AnchorSelector
from sparsekv.presses import AnchorPress, make_press, without_waiting
from sparsekv.training.anchor import build_kv_mask_from_anchors
from sparsekv.training.choices import check_rules
from sparsekv.training.draws import row_streams, uniform_draws

PositionEmbeddings = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class LayerContext:
    """What a rule may read of one layer at a cut of C tokens.

    module : the attention module, with `layer_idx`, `head_dim`, `rotary_emb`.
    hidden_states : [B, C, hidden], the layer's normed input.
    keys, values : [B, G, C, D], keys after the rotary embedding.
    position_embeddings : (cos, sin), each [1 or B, C, D]; None when the model hands its layers none.
    input_ids : Long[B, C].
    real : Bool[B, C], False at padding; None when there is none.
    row_seeds : Long[B], for random draws that do not depend on the batch a row is in.
    """

    module: nn.Module
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    position_embeddings: PositionEmbeddings
    input_ids: Tensor
    real: Tensor | None
    row_seeds: Tensor

    def row(self, index: int, start: int, stop: int) -> "LayerContext":
        """The real tokens [start, stop) of one row, as a batch of one without padding."""
        one = slice(index, index + 1)
        rotary = self.position_embeddings
        if rotary is not None:
            cos, sin = (x.expand(len(self.input_ids), -1, -1)[one, start:stop] for x in rotary)
            rotary = (cos, sin)
        return replace(
            self,
            hidden_states=self.hidden_states[one, start:stop],
            keys=self.keys[one, :, start:stop],
            values=self.values[one, :, start:stop],
            position_embeddings=rotary,
            input_ids=self.input_ids[one, start:stop],
            real=None,
            row_seeds=self.row_seeds[one],
        )


class Kept(NamedTuple):
    """What a rule keeps of one layer at a cut.

    keep : Bool[B, G, C].
    number : entries that a head keeps, in every row on average over its heads; None when rows differ.
    scores : [B, G, C], what `keep` is the top of, with their gradient where that is on; None where the rule does not
        rank, rows are padded or everything is kept. [B, 1, G·C] of heads that share a budget.
    even : whether every head keeps that number.
    """

    keep: Tensor
    number: int | None
    scores: Tensor | None = None
    even: bool = True


class Rule(Protocol):
    """Decides `keep` for one layer and cut."""

    @property
    def same_in_all_layers(self) -> bool: ...

    def keep(self, context: LayerContext) -> Kept: ...


@dataclass
class PressRule:
    """The entries a `ScorerPress` keeps: the top of its own score, as its `compress` does."""

    press: ScorerPress

    @property
    def same_in_all_layers(self) -> bool:
        """Whether what is kept depends on tokens and positions only."""
        return type(self.press) in (AnchorPress, StreamingLLMPress)

    def keep(self, context: LayerContext) -> Kept:
        if context.real is not None:
            return Kept(self._keep_padded(context), None)
        length = context.keys.shape[2]
        count = self._budget(context.module, length)
        if count >= length or length <= shortest_context(self.press):
            return Kept(torch.ones_like(context.keys[..., 0], dtype=torch.bool), length)
        return self._top(self._score(context), count)

    def _top(self, scores: Tensor, count: int) -> Kept:
        """What scores [B, G, C] keep of `count` entries a head."""
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)
        return Kept(kept, count, scores)

    def _score(self, context: LayerContext) -> Tensor:
        """[B, G, C], of rows without padding."""
        if isinstance(self.press, AnchorPress):
            self.press.input_ids = context.input_ids
        if isinstance(self.press, SeededRandomPress):
            self.press.row_seeds = context.row_seeds
        rows, length = context.input_ids.shape
        if isinstance(self.press, NonCausalAttnPress) and rows > 1:  # its scores are relative to those of all rows
            return torch.cat([self._score(context.row(row, 0, length)) for row in range(rows)])
        kwargs = {"position_embeddings": context.position_embeddings}
        tensors = (context.hidden_states, context.keys, context.values)
        return self.press.score(context.module, *tensors, attentions=None, kwargs=kwargs)

    def _budget(self, module: nn.Module, length: int) -> int:
        if isinstance(self.press, PyramidKVPress):
            return self.press.get_layer_budget(module, length)
        return compute_n_kept(length, self.press.compression_ratio)

    def _keep_padded(self, context: LayerContext) -> Tensor:
        """Row by row over its real tokens: exactly what the press keeps of the row without its padding."""
        assert context.real is not None
        kept = torch.zeros_like(context.keys[..., 0], dtype=torch.bool)
        for row, real in enumerate(context.real):
            positions = real.nonzero()
            if len(positions):
                start, stop = int(positions[0]), int(positions[-1]) + 1
                kept[row, :, start:stop] = self.keep(context.row(row, start, stop)).keep[0]
        return kept


@dataclass
class SharedBudgetRule(PressRule):
    """The entries an `AdaKVPress` keeps: the heads of a layer share their budget, each with a floor of its own.

    AdaKV (https://arxiv.org/abs/2407.11550). `press` is the one inside, whose scores it compares over heads.
    """

    safeguard: float = 0.0  # share of a head's budget that is its own

    def _top(self, scores: Tensor, count: int) -> Kept:
        safe = max(1, int(count * self.safeguard)) if self.safeguard > 0 else 0
        pinned = scores.scatter(-1, scores.topk(safe, dim=-1).indices, torch.finfo(scores.dtype).max).flatten(1)
        evicted = (-pinned).topk(pinned.shape[1] - scores.shape[1] * count, dim=-1).indices
        kept = torch.ones_like(pinned, dtype=torch.bool).scatter_(-1, evicted, False)
        return Kept(kept.view_as(scores), count, pinned[:, None], even=False)


@dataclass
class AnchorRandomRule:
    """Anchors plus a uniform sample of the rest up to the budget, drawn anew for every layer and head."""

    selector: AnchorSelector
    keep_ratio: float
    same_in_all_layers: ClassVar[bool] = False

    def keep(self, context: LayerContext) -> Kept:
        anchors = self.selector(context.input_ids, context.real).to(context.keys.device)
        heads, length = context.keys.shape[1:3]
        lengths = length if context.real is None else context.real.sum(-1)
        seeds = torch.as_tensor(context.row_seeds, device=anchors.device)
        draws = uniform_draws(row_streams(seeds, layer_of(context.module), lengths), heads, length)
        keep = build_kv_mask_from_anchors(anchors, self.keep_ratio, heads, draws, context.real)
        counts = keep.sum(-1).flatten().tolist()  # rows whose anchors exceed the budget keep more than the others
        return Kept(keep, counts[0] if len(set(counts)) == 1 else None)


@dataclass
class SeededRandomPress(ScorerPress):
    """kvpress's RandomPress with draws that depend on the row and layer, never on the batch or on global state."""

    row_seeds: Sequence[int] | Tensor = ()
    _known: tuple[Any, int, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    def score(
        self,
        module: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Uniform float32[B, G, C]."""
        heads, length = keys.shape[1:3]
        if self._known is None or self._known[0] is not self.row_seeds or self._known[1] != length:
            seeds = torch.as_tensor(self.row_seeds, device=keys.device)
            layers = torch.arange(module.config.num_hidden_layers, device=keys.device)[:, None]
            self._known = self.row_seeds, length, row_streams(seeds, layers, length)  # of all layers at once
        return uniform_draws(self._known[2][layer_of(module)].to(keys.device), heads, length)


def layer_of(module: nn.Module) -> int:
    """The index of an attention layer, which the module knows itself."""
    index: Any = module.layer_idx
    return index


def shortest_context(press: ScorerPress) -> int:
    """Tokens that a context must exceed for this press to score it (its observation window or protected ends)."""
    inner = getattr(press, "press", press)
    ends = getattr(inner, "sink_size_start", 0) + getattr(inner, "sink_size_end", 0)
    return max(getattr(inner, "window_size", 0), getattr(inner, "n_sink", 0), ends, int(isinstance(inner, TOVAPress)))


@dataclass
class AnchorRule:
    """Every anchor and nothing else: what a static cache holds besides its recent window."""

    selector: AnchorSelector
    same_in_all_layers: ClassVar[bool] = True

    def keep(self, context: LayerContext) -> Kept:
        anchors = self.selector(context.input_ids, context.real).to(context.keys.device)
        return Kept(anchors[:, None].expand(-1, context.keys.shape[1], -1), None)


def make_rule(name: str, keep_ratio: float, selector: AnchorSelector, geometry: str = "two_region") -> Rule:
    """A fresh rule. In the streaming geometry the recent window is each query's own, so it is no anchor of the row.

    Raises
    ------
    UserError
        If the name is unknown, or no rule of this geometry.
    """
    check_rules([name], geometry)
    ratio = 1 - keep_ratio
    if geometry == "streaming":
        selector = selector.without_recent()
        return AnchorRule(selector) if name == "anchor" else AnchorRandomRule(selector, keep_ratio)
    if name == "anchor":
        return PressRule(AnchorPress(ratio, anchors=selector.config, selector=selector))
    if name == "random":
        return PressRule(SeededRandomPress(ratio))
    if name == "anchor_random":
        return AnchorRandomRule(selector, keep_ratio)
    press = make_press(name, ratio)
    if isinstance(press, AdaKVPress):
        return SharedBudgetRule(without_waiting(press.press), press.alpha_safeguard)
    assert isinstance(press, ScorerPress)
    return PressRule(without_waiting(press))
