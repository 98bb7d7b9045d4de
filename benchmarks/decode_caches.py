"""The caches that benchmarks/decode.py compares, filled with random entries, and what steps over them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from sparsekv.anchors import AnchorConfig
from sparsekv.inference.anchor_cache import Slots
from sparsekv.inference.static_cache import StaticAnchorCache

STEPS, REPEATS, WARM_UP = 12, 3, 4
ROOM = WARM_UP + STEPS * REPEATS + 1
NAMES = {
    "dynamic": "DynamicCache, eager",
    "stock": "StaticCache, compiled",
    "static": "StaticAnchorCache, compiled",
    "graph": "StaticAnchorCache, graph only",
    "evicted": "DynamicCache of what is kept, eager",
    "snapkv": "kvpress, SnapKV, eager",
}


@dataclass(frozen=True)
class Cell:
    """A row of the table: `kept` entries of `context` tokens for each of `batch` texts."""

    contender: str
    context: int
    kept: int
    batch: int


class RandomAnchors:
    """Stands for an `AnchorSelector`: of random ids, this share is kept."""

    def __init__(self, share: float, vocabulary: int) -> None:
        self.config, self.first = AnchorConfig(), vocabulary - round(share * vocabulary)

    def classes(self, ids: Tensor) -> Tensor:
        return ids >= self.first


def random_entries(model: Any, cell: Cell, slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer."""
    config = model.config
    shape = (cell.batch, config.num_key_value_heads, slots, config.head_dim)
    for _ in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        yield keys, values


def dynamic(model: Any, cell: Cell) -> tuple[Any, Any]:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(random_entries(model, cell, cell.kept)):
        cache.update(keys, values, number)
    return cache, model


def stock(model: Any, cell: Cell) -> tuple[Any, Any]:
    """As `generate` of transformers compiles it."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=cell.context + ROOM)
    heads = (config.num_key_value_heads, config.head_dim)
    cache.early_initialization(cell.batch, *heads, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys[:, :, : cell.context].normal_()
        layer.values[:, :, : cell.context].normal_()
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(cell.context)
    compiled = torch.compile(model.__call__, mode="reduce-overhead", fullgraph=True)
    cache_position = torch.tensor([cell.context - 1], device=model.device)

    def forward(**inputs: Any) -> Any:
        cache_position.add_(1)
        return compiled(**inputs, cache_position=cache_position)

    return cache, forward


def static(model: Any, cell: Cell, compiled: bool) -> tuple[Any, Any]:
    """As after a context of which this much is kept."""
    selector: Any = RandomAnchors(0, model.config.vocab_size)
    cache = StaticAnchorCache(model, selector=selector, room=ROOM, compiled=compiled)
    for keys, values in random_entries(model, cell, cell.kept):
        layer = DynamicLayer()
        layer.update(keys, values)
        cache.layers.append(layer)
    real = torch.ones(cell.batch, cell.kept, dtype=torch.bool, device=model.device)
    cache.slots = tuple(Slots(real.long(), real.long(), real, real))
    cache.num_rows, cache.seen, cache.cut, cache.floor = cell.batch, cell.context, cell.context, cell.context
    cache.settle()
    return cache, model


def snapkv(model: Any, cell: Cell) -> tuple[Any, Any]:
    """Prefilled: a press acts there."""
    cache = DynamicCache()
    read_evicted_by_snapkv(model, random_ids(model, cell.context), cache, cell.kept / cell.context)
    return cache, model


def random_ids(model: Any, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, length), device=model.device)


def read_evicted_by_snapkv(model: Any, ids: Tensor, cache: Any, keep: float) -> Tensor:
    from sparsekv.presses import make_press

    press: Any = make_press("snapkv", 1 - keep)
    position = torch.arange(ids.shape[1], device=ids.device)  # kvpress reads it; later transformers do not give it
    with press(model):
        return model(input_ids=ids, past_key_values=cache, cache_position=position, logits_to_keep=1).logits


CACHES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "dynamic": dynamic,
    "stock": stock,
    "static": partial(static, compiled=True),
    "graph": partial(static, compiled=False),
    "evicted": dynamic,
    "snapkv": snapkv,
}
