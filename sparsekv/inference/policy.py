"""What a cache keeps: a pure function of token ids and positions, without a model and without a cache.

A serving system can call it as it is: every argument is a number or an array of any library, combined element by
element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekv.errors import UserError

if TYPE_CHECKING:
    from sparsekv.anchors import AnchorConfig


@dataclass(frozen=True)
class AnchorPolicy:
    """Of a context, keep its sink, its last tokens, and the anchors between them.

    Attributes
    ----------
    sink_size : int
        First tokens, always kept.
    recent_size : int
        Last tokens: the ring.
    budget : int, optional
        Most tokens that are kept of a context. The oldest anchors that are no sinks leave first. None: no limit.

    Raises
    ------
    UserError
        If the budget is smaller than sink and ring together.
    """

    sink_size: int
    recent_size: int
    budget: int | None = None

    def __post_init__(self) -> None:
        least = self.sink_size + self.recent_size
        if self.budget is not None and self.budget < max(least, 1):
            parts = f"sink_size {self.sink_size} + recent_size {self.recent_size}"
            raise UserError(f"budget {self.budget}: must be {max(least, 1)} tokens or more, {parts}")

    @classmethod
    def of(cls, anchors: AnchorConfig, budget: int | None = None) -> AnchorPolicy:
        """The policy of the anchors: a part that is not used has size 0."""
        sink = anchors.sink_size if anchors.use_sink else 0
        recent = anchors.recent_size if anchors.use_recent else 0
        return cls(sink, recent, budget)

    def keeps(self, position: Any, is_anchor: Any, context: Any, older: Any = None, older_than_ring: Any = None) -> Any:
        """Whether a context of `context` tokens keeps the token at `position`.

        Once False it stays False as the context grows, so a token that has left never has to come back.

        Parameters
        ----------
        position : int or array
            Of the token, counted in real tokens from 0.
        is_anchor : bool or array
            Whether its id is an anchor, and it is no sink.
        context : int or array
            Tokens of the context, [0, context).
        older, older_than_ring : int or array
            How many such anchors there are before `position`, and before `context - recent_size`. Read only where
            there is a budget.

        Returns
        -------
        bool or array
        """
        if self.budget is not None:
            room = self.budget - self.sink_size - self.recent_size
            is_anchor = is_anchor & (older_than_ring - older <= room)
        kept = (position < self.sink_size) | (position >= context - self.recent_size) | is_anchor
        return kept & (position < context)
