"""One prefill, every press: what each press leaves in the cache of one context.

A prefill press only reads what a full-attention forward pass computed, so one pass serves them all. At every layer,
scores that presses share are computed once, and presses of one budget are evicted together; where a press does more
than that, its own hook runs on its own copy of the layer's keys and values. Presses with passes of their own get them.

Shapes: C context tokens.
"""

import copy
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress, FinchPress, KeyRerotationPress
from kvpress.utils import compute_n_kept
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv.evaluation.engine.evicted import (
    EvictedCache,
    highest,
    take_masked,
    without_masked,
)
from sparsekv.evaluation.engine.memory import is_out_of_memory
from sparsekv.evaluation.engine.replay import ReplayAt, evict_by_replay
from sparsekv.evaluation.engine.scores import Scores, draws, marks, ranks
from sparsekv.modes import seed_device


@torch.inference_mode()
def prefill_shared(
    model: PreTrainedModel, context_ids: Tensor, presses: Mapping[Any, BasePress | ReplayAt | None], seed: int = 0
) -> dict[Any, EvictedCache | Exception]:
    """Prefill a context once with full attention and evict it by every press.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode, with the attention implementation that the presses need.
    context_ids : Long[1, C]
    presses : mapping
        Anything hashable → a press that shares a prefill (`sparsekv.presses.shares_prefill`) and knows the model
        (`post_init_from_model`), KVzip at a ratio, or None: the full cache.
    seed : int
        Of presses that draw at random: a draw depends on this, the context, the press's key and the layer alone.

    Returns
    -------
    dict
        Each key's cache, or the exception that its press raised; the other presses go on.
    """
    replays = {key: press for key, press in presses.items() if isinstance(press, ReplayAt)}
    hooked = {key: press for key, press in presses.items() if not isinstance(press, ReplayAt)}
    fork = _Fork(hooked, context_ids, seed, keeps_cache=bool(replays))
    cache: Any = DynamicCache()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), fork(model):
        model.model(input_ids=context_ids.to(model.device), past_key_values=cache)
    for key, press in hooked.items():
        result = fork.outcome[key]
        if isinstance(result, EvictedCache) and _rerotates(press):
            result.start = result.layers[0].keys.shape[1]
    return fork.outcome | evict_by_replay(model, context_ids, cache, replays)


def _rerotates(press: BasePress | None) -> bool:
    """Whether the kept keys move to positions 0 … n, so that the question follows them there."""
    return isinstance(press, KeyRerotationPress) or (isinstance(press, FinchPress) and press.rerotate_keys)


@dataclass
class _Fork(BasePress):
    """Evicts what a layer computed by every press, and empties the layer's cache unless it is to be kept."""

    presses: dict[Any, BasePress | None]
    context_ids: Tensor
    seed: int
    keeps_cache: bool
    outcome: dict[Any, EvictedCache | Exception] = field(init=False)
    scores: Scores = field(default_factory=Scores, init=False)

    def __post_init__(self) -> None:
        self.outcome = {key: EvictedCache(start=self.context_ids.shape[1]) for key in self.presses}
        self.seed = zlib.crc32(self.context_ids.cpu().numpy().tobytes(), self.seed)

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        length = self.context_ids.shape[1]
        kwargs.setdefault("cache_position", torch.arange(length, device=layer.keys.device))  # transformers ≥ 5.3
        self.scores.begin(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
        waiting = _Waiting()
        for key, press in self.presses.items():
            cache = self.outcome[key]
            if isinstance(cache, Exception):
                continue
            if draws(press):
                seed_device(layer.keys.device, zlib.crc32(f"{key} {module.layer_idx}".encode(), self.seed))
            try:
                if not waiting.takes(cache, press, self.scores):
                    cache.append(*_evict_layer(press, module, input, kwargs, output, layer))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.outcome[key] = error
        waiting.evict(layer.keys, layer.values)
        if not self.keeps_cache:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        return output


class _Waiting:
    """Caches of one layer that are made together."""

    def __init__(self) -> None:
        self.ranked: dict[Any, list[tuple[EvictedCache, Tensor]]] = defaultdict(list)
        self.marked: list[tuple[EvictedCache, tuple[Tensor, ...]]] = []

    def takes(self, cache: EvictedCache, press: Any, scores: Scores) -> bool:
        """Whether this cache of a press is made together with others; if so, what it keeps is decided here."""
        if not (ranks(press) or marks(press)) or press.compression_ratio == 0:
            return False
        module, _, keys, *_ = scores.inputs
        if ranks(press):
            found = scores(press)
            budget = compute_n_kept(keys.shape[2], press.compression_ratio)
            self.ranked[budget, found.dtype].append((cache, found))
        else:
            scores.knowing(press).compress(*scores.inputs)
            masked, module.masked_key_indices = module.masked_key_indices, None
            self.marked.append((cache, masked))
        return True

    def evict(self, keys: Tensor, values: Tensor) -> None:
        """Add this layer, keys and values [1, G, C, D], to every cache taken."""
        for (budget, _), taken in self.ranked.items():
            scores = torch.cat([scores for _, scores in taken])
            for (cache, _), entries in zip(taken, highest(keys, values, scores, budget), strict=True):
                cache.add(entries, entries.nbytes)
        if self.marked:
            left = without_masked([(keys, values, masked) for _, masked in self.marked])
            for (cache, _), entries in zip(self.marked, left, strict=True):
                cache.add(entries, keys.nbytes + values.nbytes)


def _evict_layer(
    press: BasePress | None, module: Any, input: Any, kwargs: dict[str, Any], output: Any, layer: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """Keys, values and masked indices that a press's hook leaves of one layer; the layer itself stays as it is."""
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
    for layer, masked in zip(cache.layers, take_masked(model), strict=True):
        evicted.append(layer.keys, layer.values, masked)
    return evicted
