"""The state of one forward pass under eviction: what every layer keeps, decided once."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv.attention import (
    combine_masks,
    dense_attention,
    global_mask,
    streaming_mask,
    two_region_attention,
    two_region_mask,
)
from sparsekv.errors import UserError
from sparsekv.modes import seed_device, switched
from sparsekv.training.anchor import AnchorSelector
from sparsekv.training.choices import SKETCHING_RULES
from sparsekv.training.plan import EvictionPlan
from sparsekv.training.rules import Kept, LayerContext, PositionEmbeddings, layer_of, make_rule
from sparsekv.training.selection import selection_loss


class ForwardEviction:
    """One forward pass under a plan: decides each layer's `keep` once, and remembers it for the backward pass.

    Not a dataclass: FSDP2 casts its inputs and would hand every layer another copy.

    Parameters
    ----------
    plan : EvictionPlan
    selector : AnchorSelector
    input_ids : Long[B, L]
    real : Bool[B, L], optional
        False at padding.
    importance : dict of layer → list of Float32[B, G, cut]
        What the teacher's later queries attend to at each cut (`selection.later_attention`): asks these layers for the
        selection loss.

    Attributes
    ----------
    keeps : dict of layer → list of Bool[B, G, cut]
    counts : dict of layer → list of int or None
        Entries that a head keeps at a cut, in every row on average over its heads; None when rows differ.
    even : dict of layer → bool
        Whether every head keeps that number at every cut.
    ranked : dict of layer → list of Kept
        Of the layers with `importance`: what was decided at each cut, with the scores that the selection loss moves.
    recomputed : bool
        Whether a layer came a second time, as in the backward pass under gradient checkpointing.
    """

    def __init__(
        self,
        plan: EvictionPlan,
        selector: AnchorSelector,
        input_ids: Tensor,
        real: Tensor | None,
        importance: Mapping[int, Sequence[Tensor]],
    ) -> None:
        length = input_ids.shape[1]
        if plan.cuts and plan.cuts[-1] >= length:
            raise ValueError(f"cut {plan.cuts[-1]} leaves no suffix in {length} tokens")
        self.plan, self.selector, self.input_ids, self.real = plan, selector, input_ids, real
        self.keeps: dict[int, list[Tensor]] = {}
        self.counts: dict[int, list[int | None]] = {}
        self.even: dict[int, bool] = {}
        self.importance = importance
        self.ranked: dict[int, list[Kept]] = {}
        self.recomputed = False
        random_rules = {"random", "anchor_random"} & set(plan.rules)
        unused = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        self._row_seeds = row_seeds(input_ids, real, plan.seed) if random_rules else unused
        self._rules = [
            make_rule(name, ratio, selector, plan.geometry)
            for name, ratio in zip(plan.rules, plan.keep_ratios, strict=True)
        ]
        self._of_all_layers: dict[tuple[int, int], Kept] = {}  # cut and heads
        self._layer_inputs: dict[int, tuple[Tensor, PositionEmbeddings]] = {}

    def stash(self, module: nn.Module, hidden_states: Tensor, position_embeddings: PositionEmbeddings) -> None:
        """Remember a layer's input until its attention has scored it; a layer that comes again is recomputed."""
        layer = layer_of(module)
        if layer in self.keeps:
            self.recomputed = True
        if self._decides(layer) and not slides(module, hidden_states.shape[1]):
            self._layer_inputs[layer] = (hidden_states, position_embeddings)

    def decide(self, module: nn.Module, key: Tensor, value: Tensor) -> list[Tensor]:
        """The layer's `keep` at each cut: Bool[B, G, cut], from [B, G, L, D] keys and values."""
        layer = layer_of(module)
        if not self._decides(layer):
            return self.keeps[layer]
        contexts = self._contexts(module, key, value)
        seed = self.plan.seed + layer if set(SKETCHING_RULES) & set(self.plan.rules) else None
        with scoring(module, key.device, seed, differentiable=layer in self.importance):
            decided = [self._keep(place, context) for place, context in enumerate(contexts)]
        if layer not in self.keeps:
            self.keeps[layer], self.counts[layer] = [kept.keep for kept in decided], [kept.number for kept in decided]
            self.even[layer] = all(kept.even for kept in decided)
            if layer in self.importance:
                self.ranked[layer] = decided
        return self.keeps[layer]

    def _keep(self, place: int, context: LayerContext) -> Kept:
        """What the rule at a cut keeps; once for all layers where that is the same."""
        rule = self._rules[place]
        if not rule.same_in_all_layers:
            return rule.keep(context)
        known = place, context.keys.shape[1]
        if known not in self._of_all_layers:
            self._of_all_layers[known] = rule.keep(context)
        kept = self._of_all_layers[known]
        return kept._replace(keep=kept.keep.to(context.keys.device))

    def _decides(self, layer: int) -> bool:
        """Whether the layer's rules run now: once, and again for the gradient of their scores when recomputed."""
        return layer not in self.keeps or (layer in self.importance and torch.is_grad_enabled())

    def _contexts(self, module: nn.Module, key: Tensor, value: Tensor) -> list[LayerContext]:
        """What the rules may read at each cut."""
        hidden_states, rotary = self._layer_inputs.pop(layer_of(module))
        return [
            LayerContext(
                module=module,
                hidden_states=hidden_states[:, :cut],
                keys=key[:, :, :cut],
                values=value[:, :, :cut],
                position_embeddings=None if rotary is None else (rotary[0][:, :cut], rotary[1][:, :cut]),
                input_ids=self.input_ids[:, :cut].to(key.device),
                real=None if self.real is None else self.real[:, :cut].to(key.device),
                row_seeds=self._row_seeds,
            )
            for cut in self.plan.cuts or (key.shape[2],)
        ]

    def selection_loss(self) -> Tensor:
        """Float32[B]: each row's selection loss, mean over cuts and over the layers with a score that has a gradient.

        A cut whose rule has no such score adds 0. Layers that are alike at a cut are one call: layer by layer, starting
        its small operations takes longer than all of them.
        """
        alike: dict[tuple, list[tuple[int, Tensor]]] = {}
        layers = set()
        for layer, decided in self.ranked.items():
            for place, kept in enumerate(decided):
                if kept.scores is not None and kept.scores.requires_grad and kept.number is not None:
                    kind = (place, kept.number, kept.even, kept.scores.shape, kept.scores.dtype, kept.scores.device)
                    alike.setdefault(kind, []).append((layer, kept.scores))
                    layers.add(layer)
        rows = torch.zeros(len(self.input_ids), device=self.input_ids.device)
        for (place, number, even, _, _, device), found in alike.items():
            scores = torch.cat([scores for _, scores in found])
            importance = torch.cat([self.importance[layer][place].to(device) for layer, _ in found])
            losses = _loss_at_cut(scores, number, importance, even)
            rows = rows + losses.unflatten(0, (len(found), -1)).sum(0).to(rows.device)
        return rows / max(len(layers) * len(self.plan.cuts), 1)

    def mask(self, keeps: list[Tensor], length: int) -> Tensor:
        """Bool[B, G, L, L]: the allowed pairs under what `decide` has kept, by the dense reference."""
        if self.plan.geometry == "two_region":
            return two_region_mask(keeps, self.plan.cuts, length)
        if self.plan.geometry == "streaming":
            config = self.selector.config
            return streaming_mask(keeps[0], config.recent_size if config.use_recent else 1)
        return global_mask(keeps[0])

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        dropout: float,
    ) -> Tensor:
        """Attention of one layer under the plan: [B, H, L, D], by the fast path where it applies."""
        keeps = self.decide(module, key, value)
        layer = layer_of(module)
        counts = [count for count in self.counts[layer] if count is not None]
        if self.plan.geometry == "two_region" and attention_mask is None and len(counts) == len(keeps):
            even = self.even[layer]
            return two_region_attention(query, key, value, keeps, self.plan.cuts, counts, scaling, dropout, even)
        mask = combine_masks(self.mask(keeps, key.shape[2]), attention_mask)
        return dense_attention(query, key, value, mask, scaling, dropout)

    def keep_ratio(self) -> float:
        """Share of the real context entries kept, over layers, heads, rows and cuts.

        Raises
        ------
        UserError
            If no layer evicted anything, as when a model does not use the attention function that was replaced.
        """
        if not self.keeps:
            raise UserError(
                "--model: none of its layers evicted anything; it bypasses transformers' AttentionInterface, or all "
                "its layers have a sliding window"
            )
        kept = total = 0.0
        for layer, keeps in self.keeps.items():
            for keep, count in zip(keeps, self.counts[layer], strict=True):
                rows, heads, cut = keep.shape
                kept += float(keep.sum()) if count is None else rows * heads * count
                total += heads * (rows * cut if self.real is None else float(self.real[:, :cut].sum()))
        return kept / total


def _loss_at_cut(scores: Tensor, number: int, importance: Tensor, even: bool) -> Tensor:
    """Float32[B]: the selection loss of one cut; over all heads together where they share a budget."""
    if even:
        return selection_loss(scores, number, importance)
    return selection_loss(scores, number * importance.shape[1], importance.flatten(1)[:, None])


def row_seeds(input_ids: Tensor, real: Tensor | None, seed: int) -> Tensor:
    """Long[B] from each row's tokens and the plan's seed: a row's draws do not depend on the batch it is in."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real.to(input_ids.device)
    weights = real.cumsum(-1) * 2_654_435_761  # positions among real tokens: padding on either side changes nothing
    sums = (input_ids * real * weights % 2_147_483_647).sum(-1)
    return (sums % 2_147_483_647 * 1_000_003 + seed) % 2**48


def begin_forward(
    plan: EvictionPlan,
    selector: AnchorSelector,
    args: tuple,
    kwargs: dict[str, Any],
    importance: Mapping[int, Sequence[Tensor]],
) -> ForwardEviction:
    """The state of one forward pass from the arguments of the decoder."""
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if input_ids is None:
        raise ValueError("eviction needs input_ids: anchors are known from the tokens")
    attention_mask = kwargs.get("attention_mask")
    real = None
    if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask.all()):
        real = attention_mask.bool()
    return ForwardEviction(plan, selector, input_ids, real, importance)


def slides(module: nn.Module, length: int) -> bool:
    """Whether the layer has a sliding window of `length` tokens or fewer: such a layer holds no long cache to evict.

    Where the model names the types of its layers, their windows count as shorter than any row. In a row as long as its
    window a layer sees everything, but by a mask of its own, which the selection loss cannot read.
    """
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return layer_types[layer_of(module)] != "full_attention"
    window = getattr(config, "sliding_window", None)
    return window is not None and window <= length


@contextlib.contextmanager
def scoring(module: nn.Module, device: torch.device, seed: int | None, differentiable: bool = False) -> Iterator[None]:
    """A press scores as it will at inference, without dropout, and leaves the random state untouched.

    Without gradient too, unless it is `differentiable`. Presses that sketch at random draw from `seed`; None: there is
    no such press, and the random state, which takes longer to save than most scores, stays as it is.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(switched(module.modules(), "training", False))
        stack.enter_context(torch.set_grad_enabled(differentiable and torch.is_grad_enabled()))
        if seed is not None:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            seed_device(device, seed)
        yield
