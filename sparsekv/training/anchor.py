"""Anchors: the tokens that are always kept, and keep masks made of anchors plus a random sample.

All functions speak of one context, [0, cut): everything at or after the cut is outside of it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from kvpress.utils import compute_n_kept

from sparsekv.errors import UserError
from sparsekv.tokens import TokenClass, classify_vocabulary

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_overflow_reported = False


@dataclass(frozen=True)
class AnchorConfig:
    """Which tokens are anchors.

    Attributes
    ----------
    use_special : bool
        Keep special tokens (see `sparsekv.tokens`).
    use_punctuation : bool
        Keep punctuation.
    use_sink : bool
        Keep the first real tokens of the context.
    use_recent : bool
        Keep the last real tokens before the cut.
    sink_size : int
        How many first tokens, 0 or more.
    recent_size : int
        How many last tokens, 0 or more.
    extra_punctuation : str
        Characters to count as punctuation besides the Unicode ones.

    Raises
    ------
    UserError
        If a size is not a whole number of 0 or more.
    """

    use_special: bool = True
    use_punctuation: bool = True
    use_sink: bool = True
    use_recent: bool = True
    sink_size: int = 4
    recent_size: int = 64
    extra_punctuation: str = ""

    def __post_init__(self) -> None:
        for name in ("sink_size", "recent_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise UserError(f"--anchors.{name} {value!r}: must be a whole number of tokens, 0 or more")


class AnchorSelector:
    """Marks the anchors of token ids with one table lookup.

    Parameters
    ----------
    config : AnchorConfig
    tokenizer : PreTrainedTokenizerBase
    model_config : PretrainedConfig, optional
        Adds the model's special ids, and makes the table as long as its vocabulary.
    generation_config : GenerationConfig, optional
        Adds its special ids.
    """

    def __init__(
        self,
        config: AnchorConfig,
        tokenizer: PreTrainedTokenizerBase,
        model_config: PretrainedConfig | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        self.config = config
        classes = classify_vocabulary(tokenizer, model_config, config.extra_punctuation, generation_config)
        table = torch.zeros_like(classes, dtype=torch.bool)
        if config.use_special:
            table |= classes == TokenClass.SPECIAL
        if config.use_punctuation:
            table |= classes == TokenClass.PUNCTUATION
        self._tables = {table.device: table}

    def without_recent(self) -> AnchorSelector:
        """The same anchors except the recent ones, sharing this selector's table."""
        other = copy.copy(self)
        other.config = replace(self.config, use_recent=False)
        return other

    def classes(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Static anchors, Bool of the shape of `input_ids` (Long): special and punctuation, by id alone."""
        device = input_ids.device
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device][input_ids]

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cut: int | None = None
    ) -> torch.Tensor:
        """Anchors of the context [0, cut).

        Padding is what `attention_mask` says it is, never what an id looks like: an end-of-text token used as padding
        is an anchor where it is real. Sink and recent count real tokens only, so both paddings give the same anchors.

        Parameters
        ----------
        input_ids : Long[B, L]
        attention_mask : Bool or Long[B, L], optional
            Nonzero where a token is real; None: all are.
        cut : int, optional
            Length of the context in positions, 0 … L; None: L.

        Returns
        -------
        Bool[B, L]
            True where an anchor; False at padding and at positions ≥ cut.

        Raises
        ------
        ValueError
            If the shapes disagree or the cut lies outside of the sequence.
        """
        length = input_ids.shape[-1]
        cut = length if cut is None else cut
        if not 0 <= cut <= length:
            raise ValueError(f"cut {cut} is outside of a sequence of {length} tokens")
        context = _real_tokens(input_ids, attention_mask)
        context = context & (torch.arange(length, device=input_ids.device) < cut)
        before = context.cumsum(-1) - context.long()  # context tokens before each position
        anchors = self.classes(input_ids)
        if self.config.use_sink:
            anchors = anchors | (before < self.config.sink_size)
        if self.config.use_recent:
            anchors = anchors | (before >= context.sum(-1, keepdim=True) - self.config.recent_size)
        return anchors & context


def kept_count(length: int, keep_ratio: float) -> int:
    """Number of the `length` tokens that a keep ratio keeps: kvpress's own rounding, at least one.

    kvpress rounds ``length * (1 - compression_ratio)`` down, and 1 − (1 − keep ratio) is not always the keep ratio.
    """
    return max(1, compute_n_kept(length, 1 - keep_ratio))


def build_kv_mask_from_anchors(
    anchors: torch.Tensor,
    keep_ratio: float,
    num_kv_heads: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep all anchors and fill the budget with a uniform random sample of the other real tokens.

    Every row keeps exactly ``kept_count(real tokens, keep_ratio)`` tokens per head, or all its anchors where those are
    more; the first time that happens in a process, a warning gives the numbers. Heads draw independently. For all
    layers at once, ask for ``layers * heads`` heads and reshape.

    Parameters
    ----------
    anchors : Bool[B, L]
        Anchors of the context; L is the context's length (slice at the cut first).
    keep_ratio : float
        Share of the real tokens to keep, in (0, 1].
    num_kv_heads : int
        H.
    generator : torch.Generator or one per row, optional
        Source of the draw, on any device. With one per row, a row's draw depends neither on the other rows nor on
        padding: 1 × 8 equals 8 × 1.
    attention_mask : Bool or Long[B, L], optional
        Nonzero where a token is real; None: all are.

    Returns
    -------
    Bool[B, H, L]
        The keep mask, on the anchors' device; False at padding.

    Raises
    ------
    UserError
        If the keep ratio is not in (0, 1].
    ValueError
        If shapes disagree or there is not one generator per row.
    """
    if not 0 < keep_ratio <= 1:
        raise UserError(f"keep ratio {keep_ratio}: must be in (0, 1]")
    real = _real_tokens(anchors, attention_mask)
    anchors = anchors & real
    # One transfer to the host: the numbers of tokens decide the budgets and the draws.
    num_real, num_anchors = torch.stack([real.sum(-1), anchors.sum(-1)]).tolist()
    budgets = [min(n, kept_count(n, keep_ratio)) for n in num_real]
    _report_overflow(num_real, num_anchors, budgets, keep_ratio)
    budget = torch.tensor([max(pair) for pair in zip(budgets, num_anchors, strict=True)], device=anchors.device)

    draw = _draw(num_real, num_kv_heads, anchors.shape[-1], generator, anchors.device)
    rank_of_real = (real.cumsum(-1) - 1).clamp(min=0)[:, None].expand_as(draw)
    score = draw.gather(-1, rank_of_real)  # in [0, 1), whatever the padding
    score = score.masked_fill(anchors[:, None], 2.0).masked_fill(~real[:, None], -1.0)
    # Ranks rather than a threshold: equal draws would exceed the budget. Stable: they fall alike in every batch.
    order = score.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(anchors.shape[-1], device=anchors.device) < budget[:, None, None]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, chosen.expand_as(order))


def _real_tokens(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Bool[B, L] on the tokens' device: True where `tokens` [B, L] is no padding."""
    if tokens.dim() != 2:
        raise ValueError(f"expected a tensor [batch, length], got shape {tuple(tokens.shape)}")
    if attention_mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if attention_mask.shape != tokens.shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not fit tokens {tuple(tokens.shape)}")
    return attention_mask.to(tokens.device) != 0


def _draw(
    num_real: list[int],
    num_heads: int,
    length: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """Float[B, H, L] uniform in [0, 1), where row b's first ``num_real[b]`` columns depend on its generator only."""
    if generator is None or isinstance(generator, torch.Generator):
        origin = device if generator is None else generator.device
        return torch.rand(len(num_real), num_heads, length, generator=generator, device=origin).to(device)
    if len(generator) != len(num_real):
        raise ValueError(f"{len(generator)} generators for {len(num_real)} rows: give one per row")
    draw = torch.zeros(len(num_real), num_heads, length, device=device)
    for row, (count, source) in enumerate(zip(num_real, generator, strict=True)):
        draw[row, :, :count] = torch.rand(num_heads, count, generator=source, device=source.device).to(device)
    return draw


def _report_overflow(num_real: list[int], num_anchors: list[int], budgets: list[int], keep_ratio: float) -> None:
    """Warn, once per process, that a row's anchors alone exceed its budget."""
    global _overflow_reported
    for real, count, budget in zip(num_real, num_anchors, budgets, strict=True):
        if count > budget and not _overflow_reported:
            _overflow_reported = True
            logger.warning(
                "anchors alone exceed the budget: keep ratio %g of %d tokens allows %d, but %d are anchors (%.1f%%); "
                "all of them are kept. To reach the ratio, lower --anchors.recent_size or turn off "
                "--anchors.use_punctuation.",
                *(keep_ratio, real, budget, count, 100 * count / real),
            )
