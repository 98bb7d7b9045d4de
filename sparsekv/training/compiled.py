"""Decoder layers and the loss compiled by torch.compile: the same steps with fewer, larger kernels.

Layers are compiled in place and one by one. Names in the state dict stay as they are, and because every layer runs the
same code, one compilation serves all of them. A layer without eviction (the teacher, the control) is one graph. Under
eviction `kv_dropout._attend_evicted` runs as it is, between the graph before it and the graph after it: two graphs if
torch can go on inside of the attention that it left there (`nested_graph_breaks`), and four before torch 2.11.

Of the loss, what follows the head's matrix product is compiled: softmax, CE and KL of a chunk of tokens, and their
gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv.errors import UserError, gist, require
from sparsekv.training.choices import Direction
from sparsekv.training.loss import LogitSums, sums_from_logits

# Compilations of one function that torch allows before it gives up on it. A run has eight: the teacher, the student's
# first layer (whose input needs no gradient) and its others, evaluation with and without eviction, and the first three
# for a last, smaller batch. Models with sliding layers have twice as many. The default is 8.
VARIANTS = 32


def compile_layers(model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let torch.compile every decoder layer of `model`, in place; the first step of each kind then takes longer.

    Parameters
    ----------
    model : PreTrainedModel
        Without the adapter's wrapper; its layers may hold an adapter.
    backend : str or callable
        Of `torch.compile`.

    Raises
    ------
    UserError
        If torch.compile does not work on this machine, or the model's layers are spread over devices or not found.
    """
    places = getattr(model, "hf_device_map", None) or {}
    require(len(set(places.values())) <= 1, "--compile: the model is spread over devices; drop --device_map")
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"--compile: {type(model).__name__} has no list of layers to compile")
    _check_compiler(model.device, backend)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    if torch.__version__ >= "2.11":  # by number, not by letter; older ones have it too, untried
        torch._dynamo.config.nested_graph_breaks = True
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)


def compile_logit_sums(backend: str | Callable[..., Any] = "inductor") -> LogitSums:
    """`sums_from_logits` compiled once for chunks of any number of tokens: how many carry loss differs by step."""
    compiled = torch.compile(sums_from_logits, backend=backend)

    def sums(
        logits: Tensor,
        teacher_logits: Tensor | None,
        targets: Tensor | None,
        temperature: float,
        direction: Direction,
    ) -> tuple[Tensor, Tensor]:
        if len(logits) == 1:  # which torch would compile by itself
            return sums_from_logits(logits, teacher_logits, targets, temperature, direction)
        for tensor in (logits, teacher_logits, targets):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, teacher_logits, targets, temperature, direction)

    return sums


def _check_compiler(device: torch.device, backend: str | Callable[..., Any]) -> None:
    try:
        torch.compile(torch.sin, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a GPU that is too old
        raise UserError(f"--compile: torch.compile does not work here: {gist(error)}") from error
