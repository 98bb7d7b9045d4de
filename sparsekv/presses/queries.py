"""The queries of an attention layer, which presses make anew from its input.

kvpress makes them as Llama, Qwen3, Gemma3 and Phi3 do. A layer that normalizes them otherwise, turns other pairs of
their entries or none, or has another factor on its logits, would be scored by what it never has. `own_queries` asks
the layer itself.

Shapes: B batch, H query heads, L tokens, D head dimension, R entries that the rotary embedding turns.
"""

import inspect
import math
import weakref
from collections.abc import MutableMapping
from typing import Any

import kvpress
import torch
from kvpress import BasePress
from kvpress.utils import get_prerope_query_states
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from sparsekv.modes import switched

Rotary = tuple[Tensor, Tensor] | None  # cos and sin, each [1 or B, L, R]; None where a model hands its layers none

IMPLEMENTATION = "sparsekv_queries"
COMPARED = 8  # tokens by which a layer is known
READERS = (  # presses that make queries, or turn keys, as Llama does
    kvpress.CAMPress,
    kvpress.CapPress,
    kvpress.CompactorPress,
    kvpress.ExpectedAttentionPress,
    kvpress.FinchPress,
    kvpress.KeyRerotationPress,
    kvpress.KVzipPress,
    kvpress.LeverageScorePress,
    kvpress.NonCausalAttnPress,
    kvpress.SimLayerKVPress,
    kvpress.SnapKVPress,
    kvpress.ThinKPress,
    kvpress.TOVAPress,
)


class _QueriesMade(Exception):  # noqa: N818 - nothing is wrong
    """Ends a layer's forward pass once its queries are there: nothing after them is wanted."""

    def __init__(self, query: Tensor, scaling: float) -> None:
        self.query, self.scaling = query, scaling


def own_queries(module: nn.Module, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, float]:
    """What a layer attends with, by its own code: queries [B, H, L, D], and the factor on its logits.

    Parameters
    ----------
    module : nn.Module
        An attention layer that attends through `transformers.AttentionInterface`.
    hidden_states : [B, L, hidden]
        Its input.
    rotary : tuple or None
        Of the positions that the queries are wanted for.

    Raises
    ------
    ValueError
        For a layer that does not attend through the interface; one of another kind may raise anything.
    """
    forward = type(module).forward  # without hooks, and without what an instance has in its place
    known = inspect.signature(forward).parameters
    given = {"position_embeddings": rotary, "attention_mask": None, "past_key_values": None}
    given = {name: value for name, value in given.items() if name in known}
    config: Any = module.config
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        forward(module, hidden_states=hidden_states.contiguous(), **given)
    except _QueriesMade as made:
        return made.query, made.scaling
    finally:
        config._attn_implementation = before
    raise ValueError(f"{type(module).__name__} does not attend through transformers' attention interface")


def _end_here(module: nn.Module, query: Tensor, *_: Any, scaling: float | None = None, **__: Any) -> None:
    raise _QueriesMade(query, query.shape[-1] ** -0.5 if scaling is None else scaling)


AttentionInterface.register(IMPLEMENTATION, _end_here)


@torch.no_grad()
def kvpress_knows(module: nn.Module, hidden_states: Tensor, rotary: Rotary) -> bool:
    """Whether kvpress makes a layer's queries as the layer does; found out once, by its last tokens.

    True as well where the layer cannot be asked: nothing is known against it.
    """
    if module not in _known:
        with switched(module.modules(), "training", False):  # dropout would draw for each of both
            _known[module] = _compare(module, hidden_states[:, -COMPARED:], rotary)
    return _known[module]


_known: MutableMapping[nn.Module, bool] = weakref.WeakKeyDictionary()


def _compare(module: nn.Module, hidden_states: Tensor, rotary: Rotary) -> bool:
    try:
        rotary = None if rotary is None else (rotary[0][:, -COMPARED:], rotary[1][:, -COMPARED:])
        own, scaling = own_queries(module, hidden_states, rotary)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a layer of any kind
        return True
    try:
        cos, sin = (x.unsqueeze(1) for x in rotary or ())
        query = get_prerope_query_states(module, hidden_states)
        query = query * cos + rotate_half(query) * sin
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a layer of another kind leads to
        return False
    if query.shape != own.shape or not math.isclose(scaling, query.shape[-1] ** -0.5, rel_tol=1e-3):
        return False
    return bool((query.float() - own.float()).abs().max() <= 0.02 * own.float().abs().max())


@torch.no_grad()
def all_known(model: PreTrainedModel) -> bool:
    """Whether kvpress makes the queries of all layers of a model as it does, by a forward pass of a few tokens."""
    decoder: Any = model.get_decoder()

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kvpress_knows(module, hidden_states, kwargs.get("position_embeddings"))

    layers = [layer.self_attn for layer in getattr(decoder, "layers", ()) if hasattr(layer, "self_attn")]
    handles = [layer.register_forward_pre_hook(ask, with_kwargs=True) for layer in layers if layer not in _known]
    try:
        if handles:
            embeddings: Any = model.get_input_embeddings()
            decoder(input_ids=torch.arange(COMPARED, device=embeddings.weight.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return all(_known.get(layer, True) for layer in layers)


def reads_queries(press: BasePress) -> bool:
    """Whether a press makes queries, or turns keys, as Llama does."""
    on_the_fly = isinstance(press, kvpress.DuoAttentionPress) and press.on_the_fly_scoring
    return on_the_fly or isinstance(press, READERS)
