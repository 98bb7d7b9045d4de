"""Where queries look, seen from themselves: zones, distances and anchors, over the second half's queries.

Each of them sees at least half of the row, so that "early" and "far" mean something.
"""

import torch
from torch import Tensor

from sparsekv.anchors import AnchorConfig

ZONES = ("sink", "early", "middle", "recent")


def describe(length: int) -> dict[str, str]:
    """Name → meaning of the figures of `RowSums` for sequences of `length` tokens."""
    later = "of the second half's attention"
    where = {
        "sink": "on the first sink_size tokens",
        "early": "between sink and recent, the half nearer the start",
        "middle": "between sink and recent, the half nearer the query",
        "recent": "on the query and the recent_size − 1 tokens before it",
    }
    meanings = {f"zone.{zone}": f"share {later} {where[zone]}" for zone in ZONES}
    meanings |= {f"value_zone.{zone}": f"zone.{zone} with value norms" for zone in ZONES}
    starts = distances(length)
    for low, high in zip(starts, [*starts[1:], length], strict=True):
        tokens = f"{low} tokens" if high == low + 1 else f"{low} to {high - 1} tokens"
        meanings[f"distance_share.{low}"] = f"share {later} outside of the sink that goes {tokens} back"
    return {
        **meanings,
        "anchor_share": f"share {later} on anchors: static ones, the sink, and the query's own recent window",
        "value_anchor_share": "anchor_share with value norms",
        "anchor_tokens": "share of the tokens seen by the second half's queries that are anchors",
    }


def distances(length: int) -> list[int]:
    """First distance of each bucket, two an octave: 0, 1, 2, 3, 4, 6, 8, 12, 16, … below `length`."""
    octaves = [low for power in range(1, length.bit_length()) for low in (2**power, 3 * 2 ** (power - 1))]
    return [low for low in [0, 1, *octaves] if low < length]


class RowSums:
    """Sums over the second half's queries of the attention that each gives to ranges around itself.

    Parameters
    ----------
    config : AnchorConfig
        Its sizes bound the zones; its switches decide what an anchor is.
    norms : Float32[H, L]
        Norm of each value, per query head.
    static_anchors : Bool[L]
        Anchors by token alone (special, punctuation).
    """

    def __init__(self, config: AnchorConfig, norms: Tensor, static_anchors: Tensor) -> None:
        heads, self.length = norms.shape
        self.half = self.length // 2
        self._sink, self._recent = config.sink_size, config.recent_size
        self._window = config.recent_size if config.use_recent else 0
        self._norms = norms
        self._anchors = static_anchors.clone()
        self._anchors[: self._sink if config.use_sink else 0] = True
        self._on_anchors = torch.stack((self._anchors.expand_as(norms), norms * self._anchors), dim=-1)  # [H, L, 2]
        self._distances = torch.tensor(distances(self.length), device=norms.device)
        self._zones = norms.new_zeros(2, heads, len(ZONES))  # plain, with value norms
        self._distance = norms.new_zeros(heads, len(self._distances))
        self._anchor = norms.new_zeros(heads, 2)

    def add(self, start: int, probabilities: Tensor, norm_sums: Tensor) -> None:
        """Take in a block: Float32[H, b, end] from query `start` on; `norm_sums` [H, b] are Σ P·‖v‖ of its queries."""
        end = probabilities.shape[-1]
        if end <= self.half:
            return
        first = max(start, self.half)
        rows, scale = probabilities[:, first - start :], 1 / norm_sums[:, first - start :]
        query = torch.arange(first, end, device=rows.device)[:, None]
        zones, buckets = self._zone_edges(query), self._distance_edges(query)

        held = _between(rows, torch.cat((zones, buckets), dim=-1))
        self._zones[0] += held[..., : len(ZONES)].sum(1)
        self._distance += held[..., len(ZONES) + 1 :].sum(1)
        held = _between(rows * self._norms[:, None, :end], zones)
        self._zones[1] += (held * scale[..., None]).sum(1)
        self._anchor += self._on_own_anchors(rows, scale, query)

    def _zone_edges(self, query: Tensor) -> Tensor:
        """[b, 1] → Long[b, 5], where the zones of each query begin, and where the last ends."""
        sink = torch.full_like(query, self._sink)
        recent = (query + 1 - self._recent).clamp(min=self._sink)
        return torch.cat((torch.zeros_like(query), sink, (sink + recent) // 2, recent, query + 1), dim=-1)

    def _distance_edges(self, query: Tensor) -> Tensor:
        """[b, 1] → Long[b, buckets + 1], from far to near; the sink is left out."""
        starts = (query + 1 - self._distances).clamp(min=self._sink)
        return torch.cat((torch.full_like(query, self._sink), starts.flip(-1)), dim=-1)

    def _on_own_anchors(self, rows: Tensor, scale: Tensor, query: Tensor) -> Tensor:
        """Attention on static anchors and sink, and on what else is in each query's recent window: summed, [H, 2]."""
        end = rows.shape[-1]
        low = max(0, end - rows.shape[1] + 1 - self._window)  # the first query's window begins here
        distance = query - torch.arange(low, end, device=rows.device)
        others = (distance >= 0) & (distance < self._window) & ~self._anchors[low:end]
        norms = self._norms[:, low:end]
        weights = torch.stack((torch.ones_like(norms), norms), dim=-1)
        held = rows @ self._on_anchors[:, :end] + (rows[..., low:] * others) @ weights
        return torch.stack((held[..., 0].sum(1), (held[..., 1] * scale).sum(1)), dim=-1)

    def figures(self) -> dict[str, Tensor]:
        """Name → Float32[H]."""
        queries = self.length - self.half
        plain, valued = self._zones / queries
        far_first = self._distance / self._distance.sum(-1, keepdim=True)
        starts = distances(self.length)[::-1]
        return {
            **{f"zone.{zone}": plain[:, index] for index, zone in enumerate(ZONES)},
            **{f"value_zone.{zone}": valued[:, index] for index, zone in enumerate(ZONES)},
            **{f"distance_share.{low}": far_first[:, index] for index, low in enumerate(starts)},
            "anchor_share": self._anchor[:, 0] / queries,
            "value_anchor_share": self._anchor[:, 1] / queries,
            "anchor_tokens": self._anchor_tokens().expand(len(plain)),
        }

    def _anchor_tokens(self) -> Tensor:
        """Mean share of what a query sees that is an anchor: the earlier ones, and its whole window."""
        query = torch.arange(self.half, self.length, device=self._anchors.device)
        earlier = torch.cat((self._anchors.new_zeros(1), self._anchors)).cumsum(0)[(query + 1 - self._window).clamp(0)]
        window = (query + 1).clamp(max=self._window)
        return ((earlier + window) / (query + 1)).mean()


def _between(rows: Tensor, edges: Tensor) -> Tensor:
    """Sums of Float32[H, b, end] over the keys from one edge to the next: edges Long[b, E] → [H, b, E − 1]."""
    index = (edges - 1).clamp(min=0).expand(len(rows), -1, -1)
    until = rows.cumsum(-1).gather(-1, index) * (edges > 0)
    return until.diff(dim=-1)
