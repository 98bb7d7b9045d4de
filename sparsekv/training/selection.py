"""The selection loss: a press's scores learn to rank highest what later queries will attend to.

Which entries a press keeps is a hard choice, so the distillation loss cannot teach it: no gradient reaches a score. Yet
most scores are smooth functions of keys, values and queries. The teacher knows what its later queries attend to; this
loss lets the student's scores follow it.

Shapes: B batch, H query heads, G key/value heads, L tokens, D head dimension, C = cut.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.kernels import works
from sparsekv.observe import causal_probabilities

SAFE = 15.0  # spreads above the border: the loss there is below 1e-6
DEEPEST = 100.0  # spreads below the border that a score can lie: what ties leave of a spread blows no gradient up


def later_attention(query: Tensor, key: Tensor, scaling: float, cuts: Sequence[int]) -> list[Tensor]:
    """The most that any later query attends to each context entry, for each cut.

    KVzip's measure of an entry's importance (https://arxiv.org/abs/2505.23416), over the text that really follows:
    importance[k] = max over queries q ≥ cut, and over the query heads that share the entry, of P[q, k].

    Parameters
    ----------
    query : [B, H, L, D]
    key : [B, G, L, D]
    scaling : float
        Factor on the logits.
    cuts : sequence of int
        Ascending positions in (0, L).

    Returns
    -------
    list of Float32[B, G, cut]
    """
    groups = key.shape[1]
    most = _most_attention(query, key, scaling, cuts)
    for earlier, later in reversed([*itertools.pairwise(most)]):  # queries after a later cut come after both
        torch.maximum(earlier, later[..., : earlier.shape[-1]], out=earlier)
    return [found.unflatten(1, (groups, -1)).amax(2) for found in most]


def _most_attention(query: Tensor, key: Tensor, scaling: float, cuts: Sequence[int]) -> list[Tensor]:
    """The most that queries from each cut to the next attend to each entry before it: Float32[B, H, cut] each."""
    if query.is_cuda and _has_kernel(query.device, query.dtype, query.shape[-1]):
        from sparsekv.training.later_kernel import most_attention

        return most_attention(query, key, scaling, cuts)
    found = []
    for start, stop in itertools.pairwise([*cuts, query.shape[2]]):
        queries, keys = query[:, :, :stop], key[:, :, :stop]
        most = query.new_zeros(*query.shape[:2], start, dtype=torch.float32)
        for _, probabilities in causal_probabilities(queries, keys, scaling, first=start):
            most = torch.maximum(most, probabilities[..., :start].amax(2))
        found.append(most)
    return found


@functools.cache
def _has_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """For heads of `width`: powers of 2, of a dtype that Triton multiplies as attention does."""

    def rehearse() -> None:
        from sparsekv.training.later_kernel import most_attention

        zeros = torch.zeros(1, 1, 2, width, device=device, dtype=dtype)
        most_attention(zeros, zeros, 1.0, (1,))

    fits = dtype in (torch.bfloat16, torch.float16) and 16 <= width <= 256 and width & (width - 1) == 0
    return fits and works(rehearse, "selection loss without a kernel of its own")


def selection_loss(scores: Tensor, count: int, importance: Tensor) -> Tensor:
    """Softened share of the later attention, cubed, that falls on entries a press evicts.

    With t the middle between a head's last kept score and its first evicted one, and s the distance from t to the
    median of the evicted, at least 1% of that to the lowest: Σ w · softplus((t − score) / s), w = importance³ / Σ
    importance³ over the heads and entries of a row. Cubed, the few entries that a later query needs outweigh the many
    that every query glances at. t and s carry no gradient; scores are taken relative to their mean, so that raising all
    of them gains nothing. A head that evicts nothing but ties with what it keeps has no s and
    gives no gradient. A head's scores of which none is negative, as attention probabilities are, are taken by their
    logarithm: the gradient of a probability vanishes with it, and so where it is needed most.

    Parameters
    ----------
    scores : [B, G, C]
        A press's, differentiable; the highest are kept. Heads that share a budget come as one: [B, 1, G·C].
    count : int
        Entries that each of these keeps, 0 < count < C.
    importance : Float32[B, G, C]

    Returns
    -------
    Float32[B]
        In units of a logistic loss: 0 when everything attended to is kept by far, log 2 at the border.
    """
    pinned = scores.detach() == torch.finfo(scores.dtype).max
    scores = scores.float()
    tiny = torch.finfo(torch.float32).tiny
    scores = torch.where((scores >= 0).all(-1, keepdim=True), scores.clamp(min=tiny).log(), scores)
    ranked = scores.detach().sort(dim=-1, descending=True).values
    border = (ranked[..., count - 1, None] + ranked[..., count, None]) / 2
    median, lowest = ranked[..., (count + ranked.shape[-1]) // 2, None], ranked[..., -1:]
    spread = torch.maximum(border - median, (border - lowest) / DEEPEST)
    safe = pinned | (scores.detach() > border + SAFE * spread)  # also what presses pin by a score above all others
    rest = scores.masked_fill(safe, 0)
    mean = rest.sum(-1, keepdim=True) / (~safe).sum(-1, keepdim=True)
    spread = spread.masked_fill(spread == 0, torch.inf)
    losses = F.softplus((border - rest + mean - mean.detach()) / spread).masked_fill(safe, 0)
    weights = importance.pow(3)
    weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=tiny)
    return (weights * losses).sum((1, 2))
