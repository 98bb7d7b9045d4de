"""Name → a fresh press. Never a shared instance: a press may hold state of one run.

Names and constructions are those of kvpress's own evaluation where it has one. By its convention `_head` means that
every head keeps the same number, `_layer` and `adakv_` that the heads of a layer share a budget. At ratio r of

- `think`, which removes channels of the keys only, 2r of them go; `snap_think` gives tokens and channels equal shares;
- `duo_attention`, the share r of the heads keeps only first and last tokens;
- `decoding_…`, the cache is cut to 1 − r of all tokens so far, time and again (or to `target_size` tokens).
"""

import difflib
import math
from collections.abc import Callable
from functools import partial

import kvpress
from kvpress import (
    BasePress,
    CAMPress,
    CompressionRatioDecodingPress,
    DecodingPress,
    ExpectedAttentionPress,
    SnapKVPress,
)
from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError, require
from sparsekv.presses.anchor_press import AnchorPress
from sparsekv.presses.parameters import parse_parameters, split_spec, with_parameters

Builder = Callable[[float], BasePress | None]


def _snap_think(ratio: float) -> BasePress:
    share = 1 - math.sqrt(1 - ratio)  # both keep the same share: (1 − share)² = 1 − ratio
    return kvpress.ComposedPress([SnapKVPress(share), kvpress.ThinKPress(2 * share)])


def _decoding(build: Callable[[float], BasePress], ratio: float) -> BasePress:
    return CompressionRatioDecodingPress(build(0.0), target_compression_ratio=ratio)


def _no_press(ratio: float) -> None:
    return None


PRESSES: dict[str, Builder] = {
    "no_press": _no_press,
    "adakv_compactor": lambda ratio: kvpress.AdaKVPress(kvpress.CompactorPress(ratio)),
    "adakv_snapkv": lambda ratio: kvpress.AdaKVPress(SnapKVPress(ratio)),
    "anchor": AnchorPress,
    "block_keydiff": lambda ratio: kvpress.BlockPress(kvpress.KeyDiffPress(ratio)),
    "cap": kvpress.CapPress,
    "chunk_knorm": lambda ratio: kvpress.ChunkPress(kvpress.KnormPress(ratio)),
    "chunkkv": lambda ratio: kvpress.ChunkKVPress(SnapKVPress(ratio)),
    "compactor": kvpress.CompactorPress,
    "critical_adakv_expected_attention": lambda ratio: kvpress.CriticalAdaKVPress(
        ExpectedAttentionPress(ratio, use_vnorm=False)  # CriticalKV weighs by the values itself
    ),
    "critical_adakv_snapkv": lambda ratio: kvpress.CriticalAdaKVPress(SnapKVPress(ratio)),
    "critical_expected_attention": lambda ratio: kvpress.CriticalKVPress(
        ExpectedAttentionPress(ratio, use_vnorm=False)
    ),
    "critical_snapkv": lambda ratio: kvpress.CriticalKVPress(SnapKVPress(ratio)),
    "cur": kvpress.CURPress,
    "duo_attention": kvpress.DuoAttentionPress,
    "duo_attention_on_the_fly": lambda ratio: kvpress.DuoAttentionPress(ratio, on_the_fly_scoring=True),
    "entropy_gated_chunkkv": lambda ratio: kvpress.EntropyGatedChunkKVPress(SnapKVPress(ratio)),
    "expected_attention": lambda ratio: kvpress.AdaKVPress(ExpectedAttentionPress(ratio, epsilon=1e-2)),
    "expected_attention_head": ExpectedAttentionPress,
    "expected_attention_stats": kvpress.ExpectedAttentionStatsPress,
    "fastkvzip": kvpress.FastKVzipPress,
    "finch": kvpress.FinchPress,
    "key_rerotation_streaming_llm": lambda ratio: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(ratio)),
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "kvcompose": lambda ratio: kvpress.KVComposePress(compression_ratio=ratio),
    "kvgrad": kvpress.KVgradPress,
    "kvzap_mlp_head": lambda ratio: kvpress.KVzapPress(ratio, model_type="mlp"),
    "kvzap_mlp_layer": lambda ratio: kvpress.AdaKVPress(kvpress.KVzapPress(ratio, model_type="mlp")),
    "kvzip": kvpress.KVzipPress,
    "kvzip_plus": lambda ratio: kvpress.KVzipPress(ratio, kvzip_plus_normalization=True),
    "lagkv": kvpress.LagKVPress,
    "leverage": kvpress.LeverageScorePress,
    "lukv": lambda ratio: kvpress.LUKVPress(ExpectedAttentionPress(epsilon=2e-2), ratio, sink=4, window=1),
    "merging_expected_attention": lambda ratio: kvpress.MergingPress(ExpectedAttentionPress(ratio, epsilon=1e-2)),
    "merging_knorm": lambda ratio: kvpress.MergingPress(kvpress.KnormPress(ratio)),
    "merging_kvzap_mlp": lambda ratio: kvpress.MergingPress(kvpress.KVzapPress(ratio, model_type="mlp")),
    "merging_snapkv": lambda ratio: kvpress.MergingPress(SnapKVPress(ratio)),
    "non_causal_attention": kvpress.NonCausalAttnPress,
    "observed_attention": kvpress.ObservedAttentionPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "qfilter": kvpress.QFilterPress,
    "random": kvpress.RandomPress,
    "RestoreKV": kvpress.RestoreKVPress,
    "RestoreKV_plus": lambda ratio: kvpress.RestoreKVPress(ratio, kvzip_plus_normalization=True),
    "snap_think": _snap_think,
    "snapkv": SnapKVPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "think": lambda ratio: kvpress.ThinKPress(2 * ratio),
    "tova": kvpress.TOVAPress,
    "cam_knorm": lambda ratio: CAMPress(kvpress.KnormPress()),
    "cam_streaming_llm": lambda ratio: CAMPress(kvpress.StreamingLLMPress()),
    "cam_tova": lambda ratio: CAMPress(kvpress.TOVAPress()),
    "decoding_adakv_expected_attention_e2": partial(
        _decoding, lambda ratio: kvpress.AdaKVPress(ExpectedAttentionPress(ratio, epsilon=1e-2))
    ),
    "decoding_adakv_snapkv": partial(_decoding, lambda ratio: kvpress.AdaKVPress(SnapKVPress(ratio))),
    "decoding_cap": partial(_decoding, kvpress.CapPress),
    "decoding_critical_snapkv": partial(_decoding, lambda ratio: kvpress.CriticalKVPress(SnapKVPress(ratio))),
    "decoding_cur": partial(_decoding, kvpress.CURPress),
    "decoding_expected_attention_head": partial(_decoding, ExpectedAttentionPress),
    "decoding_keydiff": partial(_decoding, kvpress.KeyDiffPress),
    "decoding_knorm": partial(_decoding, kvpress.KnormPress),
    "decoding_lagkv": partial(_decoding, kvpress.LagKVPress),
    "decoding_qfilter": partial(_decoding, kvpress.QFilterPress),
    "decoding_random": partial(_decoding, kvpress.RandomPress),
    "decoding_snapkv": partial(_decoding, SnapKVPress),
    "decoding_streaming_llm": partial(_decoding, kvpress.StreamingLLMPress),
    "decoding_tova": partial(_decoding, kvpress.TOVAPress),
}

LARGEST_RATIO = {"think": 0.5, "snap_think": 0.75}  # channels of the keys are removed, the values stay whole

# Presses of kvpress's evaluation that cannot be a cell of a matrix
REFUSED = {
    "cam_adakv_snapkv": "CaM reads a score that AdaKV has not; take cam_knorm or decoding_adakv_snapkv",
    "kvcompose_unstructured": "it leaves a second, whole copy of the context in the cache; take kvcompose",
    "kvzap_linear": "it evicts below a threshold, not by ratio; take kvzap_mlp_layer:model_type=linear",
    "kvzap_mlp": "it evicts below a threshold, not by ratio; take kvzap_mlp_layer",
}


def make_press(
    spec: str, compression_ratio: float, tokenizer: PreTrainedTokenizerBase | None = None
) -> BasePress | None:
    """A new press by name, with parameters; None for `no_press`.

    Parameters
    ----------
    spec : str
        A key of `PRESSES`, and parameters of its classes: ``snapkv:window_size=32:kernel_size=3``. A `decoding_…` press
        with ``target_size=512`` keeps that many tokens and does not use the ratio; `cam_…` knows no other way.
    compression_ratio : float
        Share evicted, in [0, 1).
    tokenizer : PreTrainedTokenizerBase, optional
        The model's; `anchor` needs it.

    Raises
    ------
    UserError
        If the name or a parameter is unknown (the nearest names, the press's parameters are given), or the ratio is out
        of range.
    """
    name, texts = split_spec(spec)
    build = _builder(name)
    require(0 <= compression_ratio < 1, f"--ratios {compression_ratio}: must be in [0, 1)")
    largest = LARGEST_RATIO.get(name, 1)
    require(compression_ratio <= largest, f"--ratios {compression_ratio}: {name} evicts at most {largest} of the cache")
    press = build(compression_ratio)
    if press is None:
        require(not texts, f"--presses {spec!r}: no_press has no parameters")
        return None
    press = _apply(spec, press, texts)
    if isinstance(press, AnchorPress):
        press.tokenizer = tokenizer
    return press


def is_decoding(spec: str) -> bool:
    """Whether the press evicts while the model decodes, and leaves the context's cache whole."""
    return split_spec(spec)[0].startswith(("decoding_", "cam_"))


def _builder(name: str) -> Builder:
    if name in REFUSED:
        raise UserError(f"--presses names {name!r}: {REFUSED[name]}")
    if name not in PRESSES:
        near = difflib.get_close_matches(name.lower(), PRESSES, n=3) or sorted(PRESSES)
        raise UserError(f"--presses names {name!r}; did you mean {', '.join(near)}?")
    return PRESSES[name]


def _apply(spec: str, press: BasePress, texts: dict[str, str]) -> BasePress:
    if isinstance(press, CompressionRatioDecodingPress) and "target_size" in texts:
        press = DecodingPress(press.base_press)
    if isinstance(press, CAMPress) and "target_size" not in texts:
        raise UserError(f"--presses {spec!r} keeps a number of tokens, not a share; write {spec}:target_size=512")
    if not texts:
        return press
    try:
        return with_parameters(press, parse_parameters(spec, press, texts))
    except (AssertionError, ValueError) as error:  # the press's own checks
        raise UserError(f"--presses {spec!r}: {error}") from error
