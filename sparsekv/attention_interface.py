"""An attention function of ours in every layer of a model, through `transformers.AttentionInterface`."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


@contextlib.contextmanager
def attending_by(model: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the layers of the model's decoder attend by `function`, which transformers knows as `name`.

    It gets SDPA's masks: none where attention is plain causal. To find out that it is, transformers looks at the
    positions of every forward pass, and the processor waits until the GPU has caught up; a second name, for which
    transformers makes no mask, spares that. A model that does not attend through the interface is left as it is.
    Contexts nest; the inner one decides. Everything is restored on exit, also after an exception.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    name : str
    function : callable
        As `AttentionInterface.register` wants it.
    """
    unmasked = f"{name}_unmasked"
    AttentionInterface.register(name, function)
    AttentionInterface.register(unmasked, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    base: Any = model
    decoder = base.get_decoder()
    configs = _configs(base, decoder)
    may_lack_mask = getattr(base, "_supports_attention_backend", False)  # others may add to a mask, as ALiBi

    def tell(chosen: str) -> None:
        for config in configs:
            config._attn_implementation = chosen

    def before(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tell(unmasked if may_lack_mask and _plain_causal(decoder, args, kwargs) else name)

    def after(*_: Any) -> None:
        if not torch.is_grad_enabled():  # otherwise layers may come again, and compiled ones know the name
            tell(name)  # for masks that are made outside of the decoder, as by `generate`

    with contextlib.ExitStack() as stack:
        for config in configs:
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        tell(name)
        stack.callback(decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(after, always_call=True).remove)
        yield


def _plain_causal(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether every layer of this forward pass sees all earlier tokens: no padding, packing, cache or window."""
    config: Any = getattr(decoder, "config", None)
    given = any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids", "past_key_values"))
    if config is None or given or len(args) > 1 or not getattr(config, "is_causal", True):
        return False
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "sliding_window", None) is None and all(kind == "full_attention" for kind in kinds)


def _configs(base: Any, decoder: nn.Module) -> list[Any]:
    """What tells the decoder's layers how to attend: one object, in most models; none where they do not ask."""
    if decoder not in _known_configs:  # a walk through all modules, at every step
        found = [module.config for module in decoder.modules() if hasattr(module, "config")]
        ask = base._can_set_attn_implementation()  # transformers reads the model's source
        _known_configs[decoder] = list({id(config): config for config in found}.values()) if ask else []
    return _known_configs[decoder]


_known_configs: MutableMapping[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
