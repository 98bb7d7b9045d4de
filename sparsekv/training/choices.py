"""What options of training choose from, apart from what does it: checking options waits for no torch."""

import difflib
from collections.abc import Sequence
from typing import Literal

from sparsekv.errors import UserError

OWN_RULES = ("anchor", "anchor_random", "random")
# Presses with a score for every head, or one that the heads of a layer share a budget by.
PRESS_RULES = (
    "adakv_snapkv",
    "compactor",
    "critical_expected_attention",
    "critical_snapkv",
    "cur",
    "expected_attention",
    "expected_attention_head",
    "keydiff",
    "knorm",
    "lagkv",
    "leverage",
    "non_causal_attention",
    "pyramidkv",
    "snapkv",
    "streaming_llm",
    "tova",
)
# Those whose scores have a gradient: not positions, nor ranks among neighbours.
SMOOTH_RULES = tuple(name for name in PRESS_RULES if name not in ("lagkv", "streaming_llm"))
SKETCHING_RULES = ("compactor", "leverage")  # they draw from torch's global generator while they score
STATIC_RULES = ("anchor", "anchor_random")  # known from token and position alone: the streaming geometry needs that
Direction = Literal["forward", "reverse", "js"]


def check_rules(names: Sequence[str], geometry: str) -> None:
    """Raise UserError unless every name is a rule that the geometry can use."""
    known = sorted({*OWN_RULES, *PRESS_RULES})
    for name in names:
        if name not in known:
            raise UserError(f"--rules names {name!r}{_instead(name, known)}")
        if geometry == "streaming" and name not in STATIC_RULES:
            allowed = ", ".join(STATIC_RULES)
            raise UserError(
                f"--rules names {name!r}, which looks at later tokens; --geometry streaming takes {allowed}"
            )


def _instead(name: str, known: Sequence[str]) -> str:
    from sparsekv.presses import PRESSES  # with torch, which only this waits for

    if name in PRESSES:
        return f", a press that training does not offer; take {', '.join(known)}"
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else f"; the rules are {', '.join(known)}"
