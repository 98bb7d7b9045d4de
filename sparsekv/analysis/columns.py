"""What tokens receive: sums of attention over groups of queries, for every position."""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sparsekv.analysis.concentration import HELD, cumulated, tokens_for
from sparsekv.analysis.names import CLASSES, POSITIONS
from sparsekv.observe import expected_attention

LATER_BLOCKS = 8  # of the second half's queries
KEPT = (50, 30)  # percent of the context


def describe(length: int) -> dict[str, str]:
    """Name → meaning of the figures of `ColumnSums` for sequences of `length` tokens."""
    meanings: dict[str, str] = {}
    for name in CLASSES:
        meanings |= {
            f"share.{name}": f"share of all attention on {name} tokens",
            f"expected.{name}": f"that share if every query spread its attention evenly over what it sees ({name})",
            f"relative.{name}": f"share / expected of {name} tokens; 1: as much as any token",
            f"relative_off_sink.{name}": f"the same without the first sink_size positions ({name})",
            f"value_share.{name}": f"share of {name} tokens, attention weighted by the norm of the values",
            f"value_relative.{name}": f"value_share / expected of {name} tokens",
        }
    for position in range(min(POSITIONS, length)):
        meanings[f"position_relative.{position}"] = f"attention on position {position} / expected"
    if length > POSITIONS:
        meanings["position_relative.rest"] = f"attention on positions {POSITIONS} and later / expected"
    for prefix, weighted in (("", ""), ("value_", ", weighted by the norm of the values")):
        for percent in HELD:
            meanings[f"{prefix}tokens_for_{percent}"] = (
                f"smallest share of the row's tokens that holds {percent}% of the second half's attention{weighted}"
            )
    blocks = f"{LATER_BLOCKS} blocks of the second half's queries"
    for percent in KEPT:
        kept = f"share of the attention on the first half that falls on its {percent}% most attended tokens"
        meanings[f"retained_{percent}"] = f"{kept}: the smallest of {blocks}"
        meanings[f"retained_mean_{percent}"] = f"{kept}: the mean of {blocks}"
    return meanings


class ColumnSums:
    """Attention received by position, summed over the first half's queries and over 8 blocks of the second's.

    Parameters
    ----------
    norms : Float32[H, L]
        Norm of each value, per query head.
    classes : Long[L]
        `TokenClass` of each token.
    sink_size : int
        Leading positions to leave out of `relative_off_sink`: they are attended to whatever stands there.
    """

    def __init__(self, norms: Tensor, classes: Tensor, sink_size: int) -> None:
        heads, self.length = norms.shape
        self.half = self.length // 2
        later = self.length - self.half
        bounds = [0, *(self.half + i * later // LATER_BLOCKS for i in range(LATER_BLOCKS + 1))]
        self._groups = norms.new_zeros(len(bounds) - 1, self.length)  # 1 where a query belongs to the group
        for group, (start, end) in enumerate(itertools.pairwise(bounds)):
            self._groups[group, start:end] = 1
        self._norms, self._classes = norms, classes
        self._sink = sink_size
        self._sums = norms.new_zeros(heads, 2 * len(self._groups), self.length)

    def add(self, start: int, probabilities: Tensor, norm_sums: Tensor) -> None:
        """Take in a block: Float32[H, b, end] from query `start` on; `norm_sums` [H, b] are Σ P·‖v‖ of its queries."""
        end = probabilities.shape[-1]
        groups = self._groups[:, start:end].expand(len(norm_sums), -1, -1)
        self._sums[..., :end] += torch.cat((groups, groups / norm_sums[:, None]), dim=1) @ probabilities

    def figures(self) -> dict[str, Tensor]:
        """Name → Float32[H]."""
        plain, valued = self._sums.chunk(2, dim=1)
        valued = valued * self._norms[:, None]
        expected = expected_attention(self.length, plain.device).float()
        return {
            **self._by_class(plain.sum(1), valued.sum(1), expected),
            **self._by_position(plain.sum(1), expected),
            **self._concentration("", plain[:, 1:].sum(1)),
            **self._concentration("value_", valued[:, 1:].sum(1)),
            **self._stability(plain[..., : self.half]),
        }

    def _by_class(self, plain: Tensor, valued: Tensor, expected: Tensor) -> dict[str, Tensor]:
        """Of Float32[H, L] received; NaN where the class does not occur."""
        members = one_hot(self._classes.long(), len(CLASSES)).to(plain)
        shares = torch.stack((plain, expected.expand_as(plain), valued)) @ members / self.length
        share, even, value_share = shares.where(members.any(0), torch.nan)
        off_sink = torch.stack((plain, expected.expand_as(plain)))[..., self._sink :]
        held, held_evenly = off_sink @ members[self._sink :] / off_sink.sum(-1, keepdim=True)
        figures: dict[str, Tensor] = {}
        for index, name in enumerate(CLASSES):
            figures |= {
                f"share.{name}": share[:, index],
                f"expected.{name}": even[:, index],
                f"relative.{name}": share[:, index] / even[:, index],
                f"relative_off_sink.{name}": held[:, index] / held_evenly[:, index],
                f"value_share.{name}": value_share[:, index],
                f"value_relative.{name}": value_share[:, index] / even[:, index],
            }
        return figures

    def _by_position(self, plain: Tensor, expected: Tensor) -> dict[str, Tensor]:
        relative = (plain / expected)[:, :POSITIONS]
        figures = {f"position_relative.{position}": column for position, column in enumerate(relative.unbind(-1))}
        if self.length > POSITIONS:
            rest = plain[:, POSITIONS:].sum(-1) / expected[POSITIONS:].sum()
            figures["position_relative.rest"] = rest
        return figures

    def _concentration(self, prefix: str, received: Tensor) -> dict[str, Tensor]:
        """Of Float32[H, L] received from the second half's queries."""
        counts = tokens_for(cumulated(received))
        return {
            f"{prefix}tokens_for_{percent}": count / self.length for percent, count in zip(HELD, counts, strict=True)
        }

    def _stability(self, context: Tensor) -> dict[str, Tensor]:
        """Of Float32[H, 1 + blocks, L/2] received by the first half, from its own queries and from each later block.

        The tokens that the first half's own queries attend to most are kept, as an eviction would.
        """
        own, later = context[:, 0], context[:, 1:]
        order = (own / expected_attention(self.half, own.device).float()).argsort(-1, descending=True)
        figures: dict[str, Tensor] = {}
        for percent in KEPT:
            kept = order[:, None, : self.half * percent // 100].expand(-1, later.shape[1], -1)
            retained = later.gather(-1, kept).sum(-1) / later.sum(-1)
            figures[f"retained_{percent}"] = retained.amin(-1)
            figures[f"retained_mean_{percent}"] = retained.mean(-1)
        return figures
