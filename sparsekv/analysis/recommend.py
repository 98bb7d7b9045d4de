"""Which anchors the measured attention speaks for, and why."""

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import yaml

from sparsekv.analysis.names import CLASSES, POSITIONS
from sparsekv.analysis.summary import CLASS_FIGURE
from sparsekv.anchor_config import AnchorConfig

SINK_ABOVE = 2.0  # times the attention of a position under evenly spread attention
RECENT_HOLDS = 0.8  # of the attention that is not on the sink
MOST_ANCHORS = 0.25  # of a row
ANCHOR_CLASSES = ("special", "punctuation")
SHOWN = 8  # positions in the evidence

Figures = Mapping[str, Mapping[str, Any]]  # name → mean, low, high
Choice = tuple[dict[str, Any], dict[str, str]]  # options, and why for each


def recommend(
    figures: Figures, shares: Mapping[str, float], given: AnchorConfig, max_len: int
) -> tuple[AnchorConfig, dict[str, str]]:
    """The anchors for a model, and the evidence for each choice, in sentences.

    Parameters
    ----------
    figures : mapping
        The base model's own (`overall` of an analysis).
    shares : mapping
        Share of each class in the rows.
    given : AnchorConfig
        What was measured with: `extra_punctuation` is taken from it, and what the rows have no evidence for.
    max_len : int
        Tokens in a row.
    """
    classes, why = _classes(figures, shares, given)
    sink, why_sink = _sink(figures)
    always = sum(shares[name] for name in ANCHOR_CLASSES if classes[f"use_{name}"])
    recent, why_recent = _recent(figures, always, sink["sink_size"], max_len)
    return replace(given, **classes, **sink, **recent), {
        **why,
        **why_sink,
        **why_recent,
        "extra_punctuation": "as given: characters that count as punctuation too",
        "others": _others(figures),
    }


def as_yaml(anchors: AnchorConfig, evidence: Mapping[str, str], heading: str) -> str:
    """An AnchorConfig as YAML, each option under the evidence for it, as a comment."""
    lines = [*_comment(heading), *_comment(evidence["others"])]
    for name, value in asdict(anchors).items():
        lines += ["", *_comment(evidence[name])] if name in evidence else []
        lines += [yaml.safe_dump({name: value}, allow_unicode=True).strip()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def recent_distance(figures: Figures) -> int:
    """Tokens of the smallest recent window that holds 80% of the attention that is not on the sink.

    As fine as the buckets of `distance_share`: the window ends where a bucket does.
    """
    found = (name.partition(".") for name in figures if name.startswith("distance_share."))
    starts = sorted(int(start) for _, _, start in found)
    means = [figures[f"distance_share.{start}"]["mean"] for start in starts]
    held, total = 0.0, sum(means)
    for start, mean in zip([*starts[1:], 2 * starts[-1]], means, strict=True):
        held += mean
        if held >= RECENT_HOLDS * total:
            return start
    return 2 * starts[-1]


def _classes(figures: Figures, shares: Mapping[str, float], given: AnchorConfig) -> Choice:
    """A class is an anchor where the whole interval of its relative attention, off the sink, lies above 1."""
    options, why = {}, {}
    for name in ANCHOR_CLASSES:
        option, figure = f"use_{name}", figures[f"{CLASS_FIGURE}.{name}"]
        if figure["low"] is None:
            options[option] = getattr(given, option)
            why[option] = f"as given: fewer than two rows hold a {name} token"
            continue
        options[option] = figure["low"] > 1
        holds = "wholly above 1" if options[option] else "not wholly above 1"
        why[option] = (
            f"{name} tokens, {shares[name]:.1%} of the text, receive {figure['mean']:.2f} times the attention of an "
            f"even spread, the sink apart; 95% interval {figure['low']:.2f} … {figure['high']:.2f}, {holds}"
        )
    return options, why


def _others(figures: Figures) -> str:
    """The classes that no option stands for."""
    means = {name: figures[f"{CLASS_FIGURE}.{name}"]["mean"] for name in CLASSES if name not in ANCHOR_CLASSES}
    said = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None)
    return f"other classes, times an even spread, the sink apart: {said}"


def _sink(figures: Figures) -> Choice:
    """Leading positions as long as the lower bound of their relative attention exceeds 2."""
    names = [f"position_relative.{position}" for position in range(POSITIONS)]
    positions = [figures[name] for name in names if name in figures]
    size = next((place for place, figure in enumerate(positions) if figure["low"] <= SINK_ABOVE), len(positions))
    shown = positions[: min(size, SHOWN - 1) + 1]
    means, lows = (", ".join(f"{figure[key]:.1f}" for figure in shown) for key in ("mean", "low"))
    why = f"attention on positions 0 … {len(shown) - 1}, times an even spread: {means} (lower bounds {lows}); "
    why += f"the sink goes on as long as the lower bound is above {SINK_ABOVE:.0f}"
    return {"use_sink": size > 0, "sink_size": size}, {"use_sink": why}


def _recent(figures: Figures, always: float, sink_size: int, max_len: int) -> Choice:
    """The window that holds 80% of the attention off the sink, or as much of it as 25% of a row leaves room for.

    Of the window and the sink, the share `always` are anchors anyway, so all anchors together are
    always + (1 − always) · (sink + recent) / L of a row.
    """
    wanted = recent_distance(figures)
    room = int((MOST_ANCHORS - always) / (1 - always) * max_len) - sink_size if always < MOST_ANCHORS else 0
    size = max(0, min(wanted, room))
    why = f"the last {wanted} tokens hold {RECENT_HOLDS:.0%} of the attention that is not on the sink"
    if size < wanted:
        limit = f"all anchors together are to take at most {MOST_ANCHORS:.0%} of {max_len} tokens"
        why += f"; {limit}, and the classes above take {always:.1%} and the sink {sink_size}: {size} are left"
    return {"use_recent": size > 0, "recent_size": size}, {"use_recent": why}
