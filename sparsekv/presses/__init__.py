"""Eviction methods by name."""

from sparsekv.presses.anchor_press import AnchorPress
from sparsekv.presses.registry import PRESSES, make_press

__all__ = ["PRESSES", "AnchorPress", "make_press"]
