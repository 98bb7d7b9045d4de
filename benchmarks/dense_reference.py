"""A step as one would first write it: a mask for every head in every layer, and the logits of all tokens at once.

What the fast path is compared with: in time and memory (`train_step.py --baseline`), in loss and gradients (`--check`).
It shares no code with the fast path. Shapes: B rows, H query heads, G key/value heads, L tokens, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Trainer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sparsekv.training.eit_trainer import EITTrainer

NAME = "dense_reference"
Keeps = Mapping[int, Sequence[Tensor]]  # layer → Bool[B, G, cut] at each cut


class DenseTrainer(EITTrainer):
    """`EITTrainer` with such steps; every head keeps a random sample, which costs no more than any rule."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with dense_attention(self.base):
            return Trainer.training_step(self, model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        ids, config = inputs["input_ids"], self.base.config
        plan = self.current_plan(ids.shape[1])
        shape = (len(ids), config.num_key_value_heads)
        keeps = {
            layer: [
                random_keep((*shape, cut), ratio, ids.device)
                for cut, ratio in zip(plan.cuts, plan.keep_ratios, strict=True)
            ]
            for layer in range(config.num_hidden_layers)
        }
        return dense_loss(model, ids, plan.cuts, keeps)


def random_keep(shape: tuple[int, int, int], ratio: float, device: torch.device) -> Tensor:
    """Bool[B, G, cut]: a uniform sample of int(cut × ratio) for every head."""
    places = torch.rand(shape, device=device).topk(max(1, int(shape[2] * ratio))).indices
    return torch.zeros(shape, dtype=torch.bool, device=device).scatter_(-1, places, True)


def dense_loss(model: nn.Module, ids: Tensor, cuts: Sequence[int], keeps: Keeps | None) -> Tensor:
    """Mean of CE + KL(teacher‖student) over the tokens after the first cut, inside `dense_attention`.

    Parameters
    ----------
    model : PeftModel
        Its base is the teacher.
    ids : Long[B, L]
    cuts : sequence of int
    keeps : dict of layer → list of Bool[B, G, cut], optional
        What each layer keeps at each cut; None: everything (the control).
    """
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=ids, use_cache=False).logits  # [B, L, V]
    student = model(input_ids=ids, use_cache=False, keeps=keeps, cuts=cuts).logits
    log_q, log_p = (logits.float().log_softmax(-1)[:, cuts[0] : -1] for logits in (teacher, student))
    ce = F.nll_loss(log_p.flatten(0, 1), ids[:, cuts[0] + 1 :].flatten())
    return ce + (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@contextlib.contextmanager
def dense_attention(base: nn.Module) -> Iterator[None]:
    """Inside, the model attends by `_attend`, in forward and in what is recomputed; compiled layers run as they are."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(NAME)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        base.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, G, L, D]
    value: Tensor,
    attention_mask: Tensor | None,
    keeps: Keeps | None = None,
    cuts: Sequence[int] = (),
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    mask = None
    if keeps is not None:
        mask = dense_mask(keeps[module.layer_idx], cuts, query.shape[2]).repeat_interleave(shared, 1)
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def dense_mask(keeps: Sequence[Tensor], cuts: Sequence[int], length: int) -> Tensor:
    """Bool[B, G, L, L]: query q (dim 2) sees key k ≤ q, and before the last cut at or before q only what is kept."""
    mask = torch.ones(*keeps[0].shape[:2], length, length, dtype=torch.bool, device=keeps[0].device).tril()
    for keep, cut, end in zip(keeps, cuts, [*cuts[1:], length], strict=True):
        mask[:, :, cut:end, :cut] = keep[:, :, None]
    return mask
