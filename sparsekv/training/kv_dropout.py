"""Eviction inside a forward pass.

`KVDropoutContext` is the seam: the one function, registered with `transformers.AttentionInterface`, that touches a
model's attention. `SDPAKVDropout` does the same by patching `scaled_dot_product_attention`, for models that bypass the
interface. Both read what to do from the module (`layer_idx`) and from the forward's own state, never from a counter of
calls, so gradient checkpointing recomputes exactly what it computed.
"""

import contextlib
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as unpatched_sdpa
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsekv.attention import combine_masks, repeat_heads
from sparsekv.attention_interface import attending_by
from sparsekv.errors import UserError, require
from sparsekv.training.anchor import AnchorSelector
from sparsekv.training.eviction import ForwardEviction, begin_forward, slides
from sparsekv.training.plan import EvictionPlan
from sparsekv.training.rules import PositionEmbeddings, layer_of

IMPLEMENTATION = "sparsekv"
LayerInput = tuple[Tensor, PositionEmbeddings]  # normed hidden states [B, L, hidden]; (cos, sin) or None


class KVDropoutContext:
    """Run a model with its KV cache evicted inside the forward pass, through `transformers.AttentionInterface`.

    Open it around the forward and the backward pass: gradient checkpointing recomputes layers during backward, and
    leaving earlier warns. Contexts nest; the inner one decides. Everything is restored on exit, also after an
    exception.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    plan : EvictionPlan, optional
        None runs with full attention.
    selector : AnchorSelector

    Attributes
    ----------
    importance : dict of layer → list of Float32[B, G, cut]
        Of the next forward (see `ForwardEviction`).
    last : ForwardEviction or None
        The most recent forward's decisions (`keeps`, `keep_ratio()`).

    Examples
    --------
    >>> with KVDropoutContext(model, plan, selector):
    ...     model(input_ids=ids, labels=ids).loss.backward()
    """

    def __init__(self, model: nn.Module, plan: EvictionPlan | None, selector: AnchorSelector) -> None:
        self.base = base_of(model)
        self.plan = plan
        self.selector = selector
        self.importance: Mapping[int, Sequence[Tensor]] = {}
        self.last: ForwardEviction | None = None
        self._stack = contextlib.ExitStack()
        self._awaits_recomputation = False

    def __enter__(self) -> "KVDropoutContext":
        with contextlib.ExitStack() as stack:  # undone at once if entering fails half-way
            self._enter(stack, self.base.get_decoder())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, exception_type: type | None, *_: object) -> None:
        self._stack.close()
        last = self.last  # decides nothing where a context inside this one did
        awaited = self._awaits_recomputation and last is not None and last.keeps and not last.recomputed
        if awaited and exception_type is None:
            warnings.warn(
                "the eviction context closed before backward: gradient checkpointing will now recompute its layers "
                "with full attention, and the gradients will be wrong. Run backward inside the context.",
                stacklevel=2,
            )

    def _enter(self, stack: contextlib.ExitStack, decoder: nn.Module) -> None:
        if not self.base._supports_sdpa:
            kind = type(self.base).__name__
            raise UserError(f"--model: {kind} does not support SDPA attention, which eviction is built on")
        stack.callback(setattr, F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = unpatched_sdpa  # the patch of an outer SDPAKVDropout rests
        stack.enter_context(attending_by(self.base, IMPLEMENTATION, evicted_attention_forward))
        handle = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        stack.callback(handle.remove)
        for module in attention_modules(decoder):
            stack.enter_context(_rotary_visible(module, decoder))
            stack.enter_context(_input_passed_on(module))

    @contextlib.contextmanager
    def full_attention(self) -> Iterator[None]:
        """Inside, forward passes see the whole cache: the teacher's."""
        plan, self.plan = self.plan, None
        try:
            yield
        finally:
            self.plan = plan

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the decoder runs: give this forward its own state, passed on to every layer as a keyword."""
        kwargs.pop("eviction", None)
        if self.plan is None:
            return args, kwargs
        self.last = begin_forward(self.plan, self.selector, args, kwargs, self.importance)
        checkpointing = getattr(decoder, "gradient_checkpointing", False) and self.base.training
        self._awaits_recomputation = checkpointing and torch.is_grad_enabled()
        return args, {**kwargs, "eviction": self.last, "use_cache": False}


class SDPAKVDropout(KVDropoutContext):
    """The same for models that call `scaled_dot_product_attention` themselves, by patching that function.

    Such models do not hand the forward's state to their layers, so a recomputed layer reads the latest evicted forward:
    run its backward before the next one begins.
    """

    def _enter(self, stack: contextlib.ExitStack, decoder: nn.Module) -> None:
        self._layer: nn.Module | None = None
        self._in_full_forward = False
        for module in attention_modules(decoder):
            stack.enter_context(_rotary_visible(module, decoder))
            stack.callback(module.register_forward_pre_hook(self._before_layer, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._after_layer, always_call=True).remove)
        stack.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(self._end, always_call=True).remove)
        stack.callback(setattr, F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = self._attend

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._in_full_forward = self.plan is None
        args, kwargs = super()._begin(decoder, args, kwargs)
        kwargs.pop("eviction", None)
        return args, kwargs

    def _end(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        self._in_full_forward = False

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._layer = module
        if self.last is not None and not self._in_full_forward:
            self.last.stash(module, *_layer_input(args, kwargs))

    def _after_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._layer = None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        layer, eviction = self._layer, self.last
        if layer is None or eviction is None or self._in_full_forward or slides(layer, query.shape[2]):
            return unpatched_sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self._layer = None  # a press may call attention itself while scoring
        config: Any = layer.config
        copies = key.shape[1] // config.num_key_value_heads  # 1 unless the model has repeated its heads itself
        keeps = eviction.decide(layer, key[:, ::copies], value[:, ::copies])
        mask = eviction.mask(keeps, key.shape[2])
        mask = repeat_heads(combine_masks(mask, attn_mask), query.shape[1])
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        return unpatched_sdpa(query, key, value, mask, dropout_p, scale=scale)


def evicted_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    eviction: ForwardEviction | None = None,
    layer_input: LayerInput | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: [B, H, L, D] queries → [B, L, H, D], and no weights.

    A compiled layer (`training/compiled.py`) holds plain attention in its graph. Eviction stays outside of it: its
    shapes depend on data, and reading `layer_idx` here would compile every layer by itself.
    """
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    if eviction is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _attend_evicted(module, query, key, value, attention_mask, eviction, layer_input, **options)


@torch.compiler.disable
def _attend_evicted(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    eviction: ForwardEviction,
    layer_input: LayerInput,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if slides(module, query.shape[2]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"eviction in training needs whole sequences: {query.shape[2]} queries, {key.shape[2]} keys")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention with a soft cap or learned sinks is not supported")
    eviction.stash(module, *layer_input)
    out = eviction.attend(module, query, key, value, attention_mask, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapter, or the model itself."""
    base: Any = model
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's attention layers: modules that know their `layer_idx` and `config` and are called Attention.

    Raises
    ------
    UserError
        If there are none, as in Bloom.
    """
    if decoder not in _attention_modules:  # a walk through all modules, at every step
        attending = [module for module in decoder.modules() if "Attention" in type(module).__name__]
        found = [module for module in attending if hasattr(module, "layer_idx") and hasattr(module, "config")]
        needed = "attention layers with a layer_idx and a config, which eviction needs"
        require(bool(found), f"--model: {type(decoder).__name__} has no {needed}")
        _attention_modules[decoder] = found
    return _attention_modules[decoder]


_attention_modules: MutableMapping[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _rotary_visible(module: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Presses read `module.rotary_emb`; set it beside the registered submodules, so that no state dict changes.

    kvpress leaves the decoder's own in every layer: that one is not asked for the layer's type, and is set anew.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    own = getattr(module, "rotary_emb", rotary) is not rotary
    if rotary is None or own or "rotary_emb" in vars(module):  # there, for a context around this one
        yield
        return
    layer_types = getattr(module.config, "layer_types", None)  # PhiMoE's embedding would take one, its layers have none
    if layer_types and "layer_type" in inspect.signature(rotary.forward).parameters:  # Gemma3: two bases in one
        rotary = functools.partial(rotary, layer_type=layer_types[layer_of(module)])
    object.__setattr__(module, "rotary_emb", rotary)
    try:
        yield
    finally:
        object.__delattr__(module, "rotary_emb")


@contextlib.contextmanager
def _input_passed_on(module: nn.Module) -> Iterator[None]:
    """Inside, an attention layer hands its input to its attention function, where it evicts.

    Not by a hook: torch.compile would leave the layer's graph in torch's own code for hooks, and torch 2.11 does not
    find its way back from there.
    """
    if "forward_alone" in vars(module):  # an outer context did it
        yield
        return
    instead = vars(module).get("forward")  # as accelerate puts one there
    object.__setattr__(module, "forward_alone", module.forward)
    object.__setattr__(module, "forward", types.MethodType(_forward_with_input, module))
    try:
        yield
    finally:
        object.__delattr__(module, "forward_alone")
        object.__delattr__(module, "forward")
        if instead is not None:
            object.__setattr__(module, "forward", instead)


def _forward_with_input(module: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("eviction") is not None:
        kwargs = {**kwargs, "layer_input": _layer_input(args, kwargs)}
    return module.forward_alone(*args, **kwargs)


def _layer_input(args: tuple, kwargs: dict[str, Any]) -> LayerInput:
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden_states, kwargs.get("position_embeddings")
