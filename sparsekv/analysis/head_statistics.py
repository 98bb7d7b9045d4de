"""All figures of one layer's attention over one row, from its queries, keys and values."""

import torch
from torch import Tensor

from sparsekv.analysis import columns, concentration, rows
from sparsekv.anchors import AnchorConfig
from sparsekv.attention import repeat_heads
from sparsekv.errors import require
from sparsekv.observe import causal_probabilities

MIN_LENGTH = 16  # two queries in each block of the second half


class HeadStatistics:
    """Reduces a layer's attention to figures per head; made once for rows of one length.

    P[q, k] are the probabilities of plain causal attention. Names with `value_` weight them by the norm of the values,
    P[q, k]·‖v_k‖₂, renormalised per query (Kobayashi et al. 2020, "Attention is Not Only a Weight"). `expected` is what
    a token would receive if every query spread its attention evenly over the tokens it sees; `relative` is received
    divided by expected. "Second half" are the queries from L/2 on.

    Parameters
    ----------
    length : int
        Tokens of a row, L.
    anchors : AnchorConfig

    Attributes
    ----------
    names : tuple of str
        Of the S figures, in order: `share.punctuation`, `position_relative.0`, …
    descriptions : dict
        Name → what the figure is, in a line.

    Raises
    ------
    UserError
        When rows of this length are too short to be told apart into halves and blocks, or the sink is more than half.
    """

    def __init__(self, length: int, anchors: AnchorConfig) -> None:
        require(length >= MIN_LENGTH, f"--max_len {length}: must be at least {MIN_LENGTH} tokens")
        fits = anchors.sink_size <= length // 2
        require(fits, f"--anchors.sink_size {anchors.sink_size}: must be at most half of --max_len {length}")
        self.length, self.anchors = length, anchors
        self.descriptions = {**columns.describe(length), **rows.describe(length), **concentration.describe()}
        self.names = tuple(self.descriptions)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, classes: Tensor, static_anchors: Tensor
    ) -> Tensor:
        """Figures of each query head.

        Parameters
        ----------
        query : [1, H, L, D]
        key, value : [1, G, L, D]
        scaling : float
            Factor on the logits.
        classes : UInt8 or Long[L]
            `TokenClass` of each token.
        static_anchors : Bool[L]
            Anchors by token alone, see `AnchorSelector.classes`.

        Returns
        -------
        Float32[H, S]
            On the query's device; NaN for a class that does not occur.
        """
        batch, heads, length, _ = query.shape
        if (batch, length) != (1, self.length):
            raise ValueError(f"expected one row of {self.length} tokens, got a query {tuple(query.shape)}")
        norms = repeat_heads(value.float().norm(dim=-1), heads)[0]
        classes, static_anchors = classes.to(query.device), static_anchors.to(query.device)
        collectors = (
            columns.ColumnSums(norms, classes, self.anchors.sink_size),
            rows.RowSums(self.anchors, norms, static_anchors),
            concentration.QuerySpread(norms),
        )
        for start, probabilities in causal_probabilities(query, key, scaling):
            block = probabilities[0]
            norm_sums = (block @ norms[:, : block.shape[-1], None]).squeeze(-1)
            for collector in collectors:
                collector.add(start, block, norm_sums)
        figures = {name: figure for collector in collectors for name, figure in collector.figures().items()}
        return torch.stack([figures[name] for name in self.names], dim=-1)
