"""Eviction methods by name."""

from sparsekv.presses.anchor_press import AnchorPress
from sparsekv.presses.availability import why_not
from sparsekv.presses.registry import PRESSES, is_decoding, make_press
from sparsekv.presses.traits import needs_eager, needs_question, shares_prefill

__all__ = [
    "PRESSES",
    "AnchorPress",
    "is_decoding",
    "make_press",
    "needs_eager",
    "needs_question",
    "shares_prefill",
    "why_not",
]
