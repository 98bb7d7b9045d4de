"""Eviction methods by name."""

from sparsekv.presses.anchor_press import AnchorPress
from sparsekv.presses.availability import why_not
from sparsekv.presses.queries import kvpress_knows
from sparsekv.presses.registry import PRESSES, is_decoding, make_press
from sparsekv.presses.traits import needs_eager, needs_question, shares_prefill
from sparsekv.presses.without_waiting import asks_layers, without_waiting

__all__ = [
    "PRESSES",
    "AnchorPress",
    "asks_layers",
    "is_decoding",
    "kvpress_knows",
    "make_press",
    "needs_eager",
    "needs_question",
    "shares_prefill",
    "why_not",
    "without_waiting",
]
