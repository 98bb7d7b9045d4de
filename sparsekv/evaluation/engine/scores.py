"""Scores of one layer, each computed once for all presses and ratios that would compute the same.

What is shared is named here, class by class: a score that does not read the compression ratio, and a press that only
reads what it is given. Subclasses and all other presses are left to their own hook.

Shapes: G key/value heads, C context tokens.
"""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from kvpress import (
    AdaKVPress,
    BasePress,
    CriticalAdaKVPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    RandomPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor

from sparsekv.presses import AnchorPress, asks_layers, kvpress_knows, without_waiting

OF_POSITIONS = (AnchorPress, StreamingLLMPress)  # the same in every layer, for one ratio
OF_LAYER = (  # the same at every ratio
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    SnapKVPress,
    TOVAPress,
)
BY_HEAD = (AdaKVPress, CriticalAdaKVPress)  # they mark entries, and write into the scores only


def ranks(press: BasePress | None) -> bool:
    """Whether the press keeps the highest scores of each head, of scores that `Scores` can give."""
    return type(press) in (*OF_POSITIONS, *OF_LAYER, RandomPress) or _wraps(press, CriticalKVPress)


def marks(press: BasePress | None) -> bool:
    """Whether the press only marks entries by head, by scores that `Scores` can give."""
    return _wraps(press, *BY_HEAD)


def draws(press: BasePress | None) -> bool:
    """Whether the press may draw at random."""
    return press is not None and (type(press) is RandomPress or not (ranks(press) or marks(press)))


def _wraps(press: Any, *kinds: type) -> bool:
    return type(press) in kinds and type(press.press) in OF_LAYER


@dataclass
class _Known(ScorerPress):
    """Stands where a press expects the one that scores."""

    scores: Tensor | None = None

    def score(self, *args: Any) -> Tensor:
        """A copy: wrappers write into it."""
        assert self.scores is not None
        return self.scores.clone()


@dataclass
class Scores:
    """The scores of one context, a layer after the other.

    Attributes
    ----------
    inputs : tuple
        What kvpress hands to `score` and `compress` at the layer: module, hidden states, keys, values, attentions and
        keyword arguments.
    """

    inputs: tuple[Any, ...] = ()
    _of_context: dict[Hashable, Tensor] = field(default_factory=dict)
    _of_layer: dict[Hashable, Tensor] = field(default_factory=dict)

    def begin(self, *inputs: Any) -> None:
        """Go on to the next layer."""
        self.inputs = inputs
        self._of_layer.clear()

    def __call__(self, press: Any) -> Tensor:
        """Scores by a press that `ranks`, [1, G, C]; not to be written into."""
        if type(press) in OF_POSITIONS:
            scores = _once(self._of_context, _settings(press), lambda: press.score(*self.inputs))
            return scores.to(self.inputs[2].device)
        if type(press) in OF_LAYER:
            return _once(self._of_layer, _settings(press, "compression_ratio"), lambda: self._score(press))
        if type(press) is CriticalKVPress:
            press = self.knowing(press)
            module, _, _, values, *_ = self.inputs
            norms = _once(self._of_layer, "norms", lambda: CriticalKVPress.vwl1norm(values, module))
            press.vwl1norm = lambda values, module: norms
        return press.score(*self.inputs)

    def _score(self, press: Any) -> Tensor:
        """By kvpress, or by queries that kvpress does not know."""
        module, hidden_states, *_, kwargs = self.inputs
        known = not asks_layers(press) or kvpress_knows(module, hidden_states, kwargs.get("position_embeddings"))
        return (press if known else without_waiting(press)).score(*self.inputs)

    def knowing(self, press: Any) -> Any:
        """A copy of a press around one that scores, to which these scores are known."""
        known = copy.copy(press)
        known.press = _Known(press.compression_ratio, self(press.press))
        return known


def _once(known: dict[Hashable, Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    if key not in known:
        known[key] = make()
    return known[key]


def _settings(press: BasePress, *but: str) -> tuple[type, frozenset[Any]]:
    """All that decides a press's scores, without the attributes that do not."""
    return type(press), frozenset((name, value) for name, value in vars(press).items() if name not in but)
