"""How few tokens hold most of a query's attention."""

import bisect

import torch
from torch import Tensor

HELD = (80, 95)  # percent of the attention
TOP = (16, 64, 256)  # tokens
SAMPLED_QUERIES = 64


def describe() -> dict[str, str]:
    """Name → meaning of the figures of `QuerySpread`."""
    sampled = f"mean over {SAMPLED_QUERIES} evenly spaced queries of the second half"
    return {
        **{
            f"query_tokens_for_{percent}": f"smallest share of the tokens a query sees that holds {percent}% of its "
            f"attention; {sampled}"
            for percent in HELD
        },
        "support": f"tokens that a query attends to, as exp(entropy of its attention); {sampled}",
        **{f"value_query_tokens_for_{percent}": f"query_tokens_for_{percent} with value norms" for percent in HELD},
        "value_support": "support with value norms",
        **{f"top_{count}": f"attention on a query's {count} most attended tokens; {sampled}" for count in TOP},
    }


def cumulated(weights: Tensor) -> Tensor:
    """[…, n] → the sum of the 1, 2, … n largest, as shares of the whole."""
    sums = weights.sort(dim=-1, descending=True).values.cumsum(-1)
    return sums / sums[..., -1:]


def tokens_for(shares: Tensor) -> list[Tensor]:
    """For each percentage of `HELD`, the smallest number of entries that hold it: Float32[…] of `cumulated` [… , n]."""
    return [(shares < percent / 100).sum(-1, dtype=torch.float32) + 1 for percent in HELD]


class QuerySpread:
    """Concentration of single queries of the second half, so many of them whatever the length.

    Parameters
    ----------
    norms : Float32[H, L]
        Norm of each value, per query head.
    """

    def __init__(self, norms: Tensor) -> None:
        length = norms.shape[-1]
        half = length // 2
        count = min(length - half, SAMPLED_QUERIES)
        self._queries = [half + (i + 1) * (length - half) // count - 1 for i in range(count)]
        self._index = torch.tensor(self._queries, device=norms.device)
        self._norms = norms
        self._sums = norms.new_zeros(norms.shape[0], len(describe()))

    def add(self, start: int, probabilities: Tensor, norm_sums: Tensor) -> None:
        """Take in a block: Float32[H, b, end] from query `start` on; `norm_sums` [H, b] are Σ P·‖v‖ of its queries."""
        end = probabilities.shape[-1]
        sampled = slice(bisect.bisect_left(self._queries, start), bisect.bisect_left(self._queries, end))
        if sampled.start == sampled.stop:
            return
        queries = self._index[sampled]
        plain = probabilities.index_select(1, queries - start)
        valued = plain * self._norms[:, None, :end] / norm_sums.index_select(1, queries - start)[..., None]
        figures: dict[str, Tensor] = {}
        for prefix, weights in (("", plain), ("value_", valued)):
            shares = cumulated(weights)
            for percent, count in zip(HELD, tokens_for(shares), strict=True):
                figures[f"{prefix}query_tokens_for_{percent}"] = count / (queries + 1)
            figures[f"{prefix}support"] = torch.special.entr(weights).sum(-1).exp()
            if not prefix:
                figures |= {f"top_{count}": shares[..., min(count, end) - 1] for count in TOP}
        self._sums += torch.stack([figures[name].sum(-1) for name in describe()], dim=-1)

    def figures(self) -> dict[str, Tensor]:
        """Name → Float32[H]."""
        return dict(zip(describe(), (self._sums / len(self._queries)).unbind(-1), strict=True))
