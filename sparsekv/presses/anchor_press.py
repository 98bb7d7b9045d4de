"""The static policy as a press: anchors are kept, the rest by recency, and no attention score is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import ScorerPress
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.anchors import AnchorConfig, AnchorSelector


@dataclass
class AnchorPress(ScorerPress):
    """Keep the sink, then the newest anchors, then the newest of the rest, up to the budget.

    The budget of the compression ratio is always met: when anchors alone exceed it, the oldest that are not sinks go
    first. Inside ``with press(model)`` the token ids are those that the model's embedding reads.

    Parameters
    ----------
    compression_ratio : float
        Share evicted, in [0, 1).
    tokenizer : PreTrainedTokenizerBase
        The model's; it says which ids are anchors (see `sparsekv.AnchorSelector`).
    anchors : AnchorConfig
        Which tokens are anchors.
    selector : AnchorSelector, optional
        Taken as it is, instead of one made of `tokenizer`, `anchors` and the model's configuration.
    input_ids : Long[B, ≥ C], optional
        The context's tokens, for whoever calls `score` or `compress` without entering the press.
    """

    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    selector: AnchorSelector | None = field(default=None, repr=False)
    input_ids: Tensor | None = field(default=None, repr=False)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Make the selector: the model's configurations may call further ids special, as in training."""
        if self.selector is None and self.tokenizer is not None:
            self.selector = AnchorSelector(self.anchors, self.tokenizer, model.config, model.generation_config)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """kvpress's context, with the token ids read where the model embeds them."""

        def read_ids(embedding: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.input_ids = arguments[0]

        hook = model.get_input_embeddings().register_forward_pre_hook(read_ids)
        try:
            with super().__call__(model):
                yield
        finally:
            hook.remove()
            self.input_ids = None

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
            raise ValueError("AnchorPress needs `tokenizer` or `selector`, and `input_ids` where it is not entered")
        length = keys.shape[2]
        anchors = self.selector(self.input_ids[:, :length]).to(keys.device)
        config = self.selector.config
        sinks = anchors & (anchors.cumsum(-1) <= (config.sink_size if config.use_sink else 0))
        position = torch.arange(length, device=keys.device, dtype=torch.float32)
        score = position + length * (anchors.float() + sinks.float())
        return score[:, None].expand(-1, keys.shape[1], -1)
