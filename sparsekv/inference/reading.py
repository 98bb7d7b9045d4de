"""Text into a cache, without the cost of logits."""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparsekv.anchors import real_tokens

CHUNK = 512  # tokens of a pass where a cache streams: its mask is as wide as what is held and long as the pass


@torch.no_grad()
def read(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Let a cache read what it has not read yet of some columns of text.

    Parameters
    ----------
    model : PreTrainedModel
    cache : Cache
    input_ids : Long[B, L]
        From the beginning of the text.
    attention_mask : Long[B, L], optional
        0 at padding.
    chunk : int, optional
        Columns of a forward pass; None: all.
    """
    decoder, real = model.get_decoder(), real_tokens(input_ids, attention_mask).long()
    position, length = (real.cumsum(-1) - 1).clamp(min=0), input_ids.shape[1]
    step = chunk or max(length, 1)
    for start in range(cache.get_seq_length(), length, step):
        end = min(start + step, length)
        decoder(
            input_ids=input_ids[:, start:end],
            attention_mask=real[:, :end],
            position_ids=position[:, start:end],
            past_key_values=cache,
        )
