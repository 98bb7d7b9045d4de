"""Keep masks made of anchors plus a random sample, by kvpress's budget."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from kvpress.utils import compute_n_kept

from sparsekv.anchors import AnchorConfig, AnchorSelector, real_tokens
from sparsekv.errors import UserError

__all__ = ["AnchorConfig", "AnchorSelector", "build_kv_mask_from_anchors", "kept_count", "overflow_unreported"]

logger = logging.getLogger(__name__)

_overflow_reported = False


def kept_count(length: int, keep_ratio: float) -> int:
    """Number of the `length` tokens that a keep ratio keeps: kvpress's own rounding, at least one.

    kvpress rounds ``length * (1 - compression_ratio)`` down, and 1 − (1 − keep ratio) is not always the keep ratio.
    """
    return compute_n_kept(length, 1 - keep_ratio)


def build_kv_mask_from_anchors(
    anchors: torch.Tensor,
    keep_ratio: float,
    num_kv_heads: int,
    generator: torch.Generator | torch.Tensor | None = None,
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
    generator : torch.Generator or Float[B, H, L], optional
        Source of the draw, on any device; or the draw, from [0, 1), by position among a row's real tokens. Where a
        row's draw is its own, what it keeps depends neither on the other rows nor on padding: 1 × 8 equals 8 × 1.
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
        If shapes disagree.
    """
    if not 0 < keep_ratio <= 1:
        raise UserError(f"keep ratio {keep_ratio}: must be in (0, 1]")
    real = real_tokens(anchors, attention_mask)
    anchors = anchors & real
    # One transfer to the host: the numbers of tokens decide the budgets and the draws.
    num_real, num_anchors = torch.stack([real.sum(-1), anchors.sum(-1)]).tolist()
    budgets = [min(n, kept_count(n, keep_ratio)) for n in num_real]
    _report_overflow(num_real, num_anchors, budgets, keep_ratio)
    budget = torch.tensor([max(pair) for pair in zip(budgets, num_anchors, strict=True)], device=anchors.device)

    draw = _draw((len(anchors), num_kv_heads, anchors.shape[-1]), generator, anchors.device)
    rank_of_real = (real.cumsum(-1) - 1).clamp(min=0)[:, None].expand_as(draw)
    score = draw.gather(-1, rank_of_real)  # in [0, 1), whatever the padding
    score = score.masked_fill(anchors[:, None], 2.0).masked_fill(~real[:, None], -1.0)
    # Ranks rather than a threshold: equal draws would exceed the budget. Stable: they fall alike in every batch.
    order = score.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(anchors.shape[-1], device=anchors.device) < budget[:, None, None]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, chosen.expand_as(order))


def _draw(
    shape: tuple[int, int, int], generator: torch.Generator | torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Float[B, H, L] from [0, 1)."""
    if not isinstance(generator, torch.Tensor):
        origin = device if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=origin).to(device)
    if generator.shape != shape:
        raise ValueError(f"a draw of {tuple(generator.shape)} for rows, heads and tokens {shape}")
    return generator.to(device)


@contextlib.contextmanager
def overflow_unreported() -> Iterator[None]:
    """Inside, anchors that exceed a budget are not warned of; the first time after it still is."""
    global _overflow_reported
    before, _overflow_reported = _overflow_reported, True
    try:
        yield
    finally:
        _overflow_reported = before


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
