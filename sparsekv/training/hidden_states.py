"""The last hidden states, from inside a model's forward pass, and a loss there in place of all the logits."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv.errors import require
from sparsekv.models import logit_changes


def run_with_loss(
    model: nn.Module, base: PreTrainedModel, inputs: dict[str, Tensor], head_loss: Callable[[Tensor, nn.Module], Tensor]
) -> Tensor:
    """Run `model` (maybe wrapped by DDP or FSDP) and compute a scalar loss where its head would make logits.

    The loss must be part of the wrapped model's own forward pass and output: FSDP gathers the head's weights only
    there. `head_loss` gets the last hidden states, [B, L, D], and the head.
    """
    found: dict[str, Tensor] = {}

    def replace_logits(head: nn.Module, args: tuple, output: Tensor) -> Tensor:
        handle.remove()  # `head_loss` calls the head itself
        found["loss"] = head_loss(found["hidden"], head)
        return found["loss"]

    handle = base.get_output_embeddings().register_forward_hook(replace_logits)
    try:
        with _noting(base, found):
            output = model(**_forward_inputs(inputs)).logits
        loss = found["loss"]
        output = output.to(loss)  # accelerate may have moved it, FSDP rounds it to bfloat16
        return output + (loss - output).detach()
    finally:
        handle.remove()


def last_hidden(model: nn.Module, base: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The decoder's last hidden states, [B, L, D], without the head's logits."""
    found: dict[str, Tensor] = {}
    with _noting(base, found):
        model(**_forward_inputs(inputs))
    return found["hidden"]


@contextlib.contextmanager
def _noting(base: PreTrainedModel, found: dict[str, Tensor]) -> Iterator[None]:
    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found["hidden"] = output[0]

    handle = base.get_decoder().register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _forward_inputs(inputs: dict[str, Tensor]) -> dict[str, Any]:
    known: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    if "attention_mask" in known:  # some presses score by distances from the row's first token
        known["position_ids"] = (known["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    return {**known, "use_cache": False, "logits_to_keep": 1}  # the one token's logits are thrown away


def require_plain_head(model: PreTrainedModel) -> None:
    """Some models scale or cap their logits after the head; the chunked loss would miss that."""
    config = model.config.get_text_config()
    changes = ", ".join(f"{name} = {getattr(config, name)}" for name in logit_changes(config))
    require(not changes, f"--model {model.name_or_path}: its {changes} is not supported in training")
