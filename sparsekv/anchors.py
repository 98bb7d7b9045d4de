"""Anchors: the tokens that are always kept.

All functions speak of one context, [0, cut): everything at or after the cut is outside of it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sparsekv.anchor_config import AnchorConfig
from sparsekv.tokens import TokenClass, classify_vocabulary

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


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
        context = real_tokens(input_ids, attention_mask)
        context = context & (torch.arange(length, device=input_ids.device) < cut)
        before = context.cumsum(-1) - context.long()  # context tokens before each position
        anchors = self.classes(input_ids)
        if self.config.use_sink:
            anchors = anchors | (before < self.config.sink_size)
        if self.config.use_recent:
            anchors = anchors | (before >= context.sum(-1, keepdim=True) - self.config.recent_size)
        return anchors & context


def real_tokens(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Bool[B, L] on the tokens' device: True where `tokens` [B, L] is no padding."""
    if tokens.dim() != 2:
        raise ValueError(f"expected a tensor [batch, length], got shape {tuple(tokens.shape)}")
    if attention_mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if attention_mask.shape != tokens.shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not fit tokens {tuple(tokens.shape)}")
    return attention_mask.to(tokens.device) != 0
