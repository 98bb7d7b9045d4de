"""One look for every figure: colours that any colour vision tells apart, and matplotlib's settings for papers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Okabe & Ito, "Color Universal Design" (2008), without the black that a dark page would swallow.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"),
)
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW)
RUNS = {"base": "#7F7F7F", "control": ORANGE, "trained": BLUE}  # a run has the same colour everywhere
MARKERS = {"base": "circle", "control": "square", "trained": "diamond"}  # and its own shape, for print in grey
SEQUENTIAL = "cividis"
DIVERGING = "PuOr"  # purple and orange around white


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """Inside, matplotlib draws figures for a paper: small sans-serif text, no frame, text in SVG stays text."""
    import matplotlib
    from cycler import cycler

    settings: dict[Any, Any] = {
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 200,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a name from data may hold a $
        "svg.hashsalt": "sparsekv",  # the same figure gives the same file
    }
    with matplotlib.rc_context(settings):
        yield
