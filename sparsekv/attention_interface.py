"""An attention function of ours in every layer of a model, through `transformers.AttentionInterface`."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


@contextlib.contextmanager
def attending_by(model: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the layers of the model's decoder attend by `function`, which transformers knows as `name`.

    It gets SDPA's masks: none where attention is plain causal. To find out that it is, transformers looks at the
    positions of every forward pass, and the processor waits until the GPU has caught up; a second name, for which
    transformers makes no mask, spares that. Contexts nest; the inner one decides. Everything is restored on exit, also
    after an exception.

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
    configs = _configs(decoder)
    no_other_use = getattr(base, "_supports_attention_backend", False)  # Falcon adds its ALiBi to the mask

    def choose(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        chosen = unmasked if no_other_use and _plain_causal(decoder, args, kwargs) else name
        for config in configs:
            config._attn_implementation = chosen

    with contextlib.ExitStack() as stack:
        for config in configs:
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = name
        stack.callback(decoder.register_forward_pre_hook(choose, with_kwargs=True).remove)
        yield


def _plain_causal(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether every layer of this forward pass sees all earlier tokens: no padding, packing, cache or window."""
    config: Any = decoder.config
    given = any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids", "past_key_values"))
    if given or len(args) > 1 or not getattr(config, "is_causal", True):
        return False
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return all(kind == "full_attention" for kind in layer_types)
    return getattr(config, "sliding_window", None) is None


def _configs(decoder: nn.Module) -> list[Any]:
    """The configurations that the decoder's modules read: one, in most models."""
    if decoder not in _known_configs:  # a walk through all modules, at every step
        found = [module.config for module in decoder.modules() if hasattr(module, "config")]
        _known_configs[decoder] = list({id(config): config for config in found}.values())
    return _known_configs[decoder]


_known_configs: MutableMapping[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
