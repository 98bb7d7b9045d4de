"""Name → a fresh press. Never a shared instance: a press may hold state of one run."""

import difflib
from collections.abc import Callable

import kvpress
from kvpress import ScorerPress

from sparsekv.errors import UserError

PRESSES: dict[str, Callable[[float], ScorerPress]] = {
    "compactor": kvpress.CompactorPress,
    "critical_expected_attention": lambda ratio: kvpress.CriticalKVPress(
        kvpress.ExpectedAttentionPress(ratio, use_vnorm=False)  # CriticalKV weighs by the values itself
    ),
    "critical_snapkv": lambda ratio: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio)),
    "cur": kvpress.CURPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "lagkv": kvpress.LagKVPress,
    "leverage": kvpress.LeverageScorePress,
    "non_causal_attention": kvpress.NonCausalAttnPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "random": kvpress.RandomPress,
    "snapkv": kvpress.SnapKVPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
}


def make_press(name: str, compression_ratio: float) -> ScorerPress:
    """A new press of kvpress by its field name.

    Parameters
    ----------
    name : str
        A key of `PRESSES`.
    compression_ratio : float
        Share evicted, in [0, 1).

    Raises
    ------
    UserError
        If the name is unknown (the nearest names are given) or the ratio is out of range.
    """
    if name not in PRESSES:
        near = difflib.get_close_matches(name, PRESSES, n=3) or sorted(PRESSES)
        raise UserError(f"unknown press {name!r}; did you mean {', '.join(near)}?")
    if not 0 <= compression_ratio < 1:
        raise UserError(f"compression ratio {compression_ratio} of press {name!r} must be in [0, 1)")
    return PRESSES[name](compression_ratio)
