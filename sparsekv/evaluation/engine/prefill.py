"""One prefill, every press: what each press leaves in the cache of one context.

A prefill press only reads what a full-attention forward pass computed, so one pass serves them all: at every layer each
press's own hook runs on its own copy of the layer's keys and values. Presses that need passes of their own (KVzip, …)
get them.

Shapes: G key/value heads, C context tokens, n entries kept, D head dimension.
"""

import copy
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress, FinchPress, KeyRerotationPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv.attention import kept_indices
from sparsekv.evaluation.engine.memory import is_out_of_memory


@dataclass(frozen=True)
class LayerEntries:
    """What one layer keeps of one context.

    keys, values : [G, n, D].
    counts : Long[G], how many of the n entries each head keeps, its first ones; None where every head keeps all n.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor | None = None


@dataclass
class EvictedCache:
    """The cache of one context after one press.

    layers : list of LayerEntries
    start : position of the first token after the context.
    physical_bytes : bytes of the tensors that the press itself leaves: masked entries still count.
    """

    start: int
    layers: list[LayerEntries] = field(default_factory=list)
    physical_bytes: int = 0

    def append(self, keys: Tensor, values: Tensor, masked: tuple[Tensor, ...] | None) -> None:
        """Add a layer's [1, G, n, D] keys and values, without the entries (batch, head, position) that are masked."""
        self.physical_bytes += keys.nbytes + values.nbytes
        entries = LayerEntries(keys[0], values[0])
        self.layers.append(entries if masked is None else _without(entries, masked))

    @property
    def length(self) -> int:
        """Entries of the longest head of the longest layer."""
        return max(entries.keys.shape[1] for entries in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Bytes that this object holds."""
        return sum(entries.keys.nbytes + entries.values.nbytes for entries in self.layers)

    @property
    def logical_bytes(self) -> int:
        """Bytes of the entries that later tokens can attend to."""
        total = 0
        for entries in self.layers:
            heads, slots, _ = entries.keys.shape
            kept = heads * slots if entries.counts is None else int(entries.counts.sum())
            total += (entries.keys.nbytes + entries.values.nbytes) * kept // max(1, heads * slots)
        return total


def _without(entries: LayerEntries, masked: tuple[Tensor, ...]) -> LayerEntries:
    """Per-head presses mark entries instead of removing them: remove them, every head's own."""
    heads, slots, dim = entries.keys.shape
    keep = torch.ones(heads, slots, dtype=torch.bool, device=entries.keys.device)
    keep[masked[1].to(keep.device), masked[2].to(keep.device)] = False
    counts = keep.sum(-1)
    index = kept_indices(keep, int(counts.max()))[..., None].expand(-1, -1, dim)
    return LayerEntries(entries.keys.gather(1, index), entries.values.gather(1, index), counts)


@torch.inference_mode()
def prefill_shared(
    model: PreTrainedModel, context_ids: Tensor, presses: Mapping[Any, BasePress | None], seed: int = 0
) -> dict[Any, EvictedCache | Exception]:
    """Prefill a context once with full attention and evict it by every press.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode, with the attention implementation that the presses need.
    context_ids : Long[1, C]
    presses : mapping
        Anything hashable → a press that shares a prefill (`sparsekv.presses.shares_prefill`) and knows the model
        (`post_init_from_model`), or None: the full cache.
    seed : int
        Of presses that draw at random: a draw depends on this, the context, the press's key and the layer alone.

    Returns
    -------
    dict
        Each key's cache, or the exception that its press raised; the other presses go on.
    """
    fork = _Fork(dict(presses), context_ids, seed)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), fork(model):
        model.model(input_ids=context_ids.to(model.device), past_key_values=DynamicCache())
    for key, press in presses.items():
        result = fork.outcome[key]
        if isinstance(result, EvictedCache) and _rerotates(press):
            result.start = result.layers[0].keys.shape[1]
    return fork.outcome


def _rerotates(press: BasePress | None) -> bool:
    """Whether the kept keys move to positions 0 … n, so that the question follows them there."""
    return isinstance(press, KeyRerotationPress) or (isinstance(press, FinchPress) and press.rerotate_keys)


@dataclass
class _Fork(BasePress):
    """Runs every press's hook on its own copy of what a layer computed, and empties the layer's cache."""

    presses: dict[Any, BasePress | None]
    context_ids: Tensor
    seed: int
    outcome: dict[Any, EvictedCache | Exception] = field(init=False)

    def __post_init__(self) -> None:
        self.outcome = {key: EvictedCache(start=self.context_ids.shape[1]) for key in self.presses}
        self.seed = zlib.crc32(self.context_ids.cpu().numpy().tobytes(), self.seed)

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        length = self.context_ids.shape[1]
        kwargs.setdefault("cache_position", torch.arange(length, device=layer.keys.device))  # transformers ≥ 5.3
        for key, press in self.presses.items():
            cache = self.outcome[key]
            if isinstance(cache, Exception):
                continue
            torch.manual_seed(zlib.crc32(f"{key} {module.layer_idx}".encode(), self.seed))
            try:
                cache.append(*_evict_layer(press, module, input, kwargs, output, layer))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.outcome[key] = error
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        return output


def _evict_layer(
    press: BasePress | None, module: Any, input: Any, kwargs: dict[str, Any], output: Any, layer: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """Keys, values and masked indices that a press leaves of one layer; the layer itself stays as it is."""
    if press is None:
        return layer.keys, layer.values, None
    own = copy.copy(layer)
    own.keys, own.values = layer.keys.clone(), layer.values.clone()  # some presses write into what they are given
    cache: Any = DynamicCache()
    cache.layers = {module.layer_idx: own}  # all that a hook looks up
    module.masked_key_indices = None
    press.forward_hook(module, input, {**kwargs, "past_key_values": cache}, output)
    masked, module.masked_key_indices = module.masked_key_indices, None
    return own.keys, own.values, masked


def prefill_alone(model: PreTrainedModel, context_ids: Tensor, press: BasePress) -> EvictedCache:
    """Prefill and evict by a press with passes of its own, as kvpress's pipeline does.

    Parameters
    ----------
    model : PreTrainedModel
    context_ids : Long[1, C]
    press : BasePress
    """
    cache: Any = DynamicCache()
    with torch.inference_mode(), press(model):
        model.model(input_ids=context_ids.to(model.device), past_key_values=cache)
    appended = max(layer.keys.shape[2] for layer in cache.layers) > context_ids.shape[1]  # RestoreKV's own tokens
    evicted = EvictedCache(start=cache.get_seq_length() if appended else context_ids.shape[1])
    for module, layer in zip(attention_layers(model), cache.layers, strict=True):
        evicted.append(layer.keys, layer.values, getattr(module, "masked_key_indices", None))
        module.masked_key_indices = None
    return evicted


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """The attention module of every layer, in order."""
    return [layer.self_attn for layer in model.model.layers]
