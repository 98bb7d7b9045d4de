"""The static policy as a press: anchors are kept, the rest by recency, and no attention score is computed."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from kvpress import ScorerPress
from torch import Tensor, nn


@dataclass
class AnchorPress(ScorerPress):
    """Keep the sink, then the newest anchors, then the newest of the rest, up to the budget.

    The budget of the compression ratio is always met: when anchors alone exceed it, the oldest that are not sinks go
    first.

    Parameters
    ----------
    compression_ratio : float
        Share evicted, in [0, 1).
    selector : callable
        Long[B, C] token ids → Bool[B, C], True at anchors (a `sparsekv.AnchorSelector`).
    sink_size : int
        The oldest anchors that go last.
    input_ids : Long[B, ≥ C]
        The context's tokens; set before the forward pass.
    """

    selector: Callable[[Tensor], Tensor] | None = None
    sink_size: int = 4
    input_ids: Tensor | None = field(default=None, repr=False)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict,
    ) -> Tensor:
        """Position, raised by C for an anchor and by 2C for a sink: float32[B, G, C], the same for every head."""
        if self.selector is None or self.input_ids is None:
            raise ValueError("AnchorPress needs `selector` and `input_ids` before the forward pass")
        length = keys.shape[2]
        anchors = self.selector(self.input_ids[:, :length]).to(keys.device)
        sinks = anchors & (anchors.cumsum(-1) <= self.sink_size)
        position = torch.arange(length, device=keys.device, dtype=torch.float32)
        score = position + length * (anchors.float() + sinks.float())
        return score[:, None].expand(-1, keys.shape[1], -1)
