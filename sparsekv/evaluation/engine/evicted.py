"""What is left of the cache of one context.

Shapes: G key/value heads, C context tokens, n entries kept, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.attention import kept_indices

MaskedLayer: TypeAlias = tuple[Tensor, Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class LayerEntries:
    """What one layer keeps of one context.

    keys, values : [G, n, D].
    counts : Long[G] on the CPU, how many of the n entries each head keeps, its first ones; None where every head keeps
        all n.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


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
        plain = LayerEntries(keys[0], values[0])
        self.add(plain if masked is None else without_masked([(keys, values, masked)])[0], plain.nbytes)

    def add(self, entries: LayerEntries, physical_bytes: int) -> None:
        """Add a layer whose press leaves tensors of so many bytes."""
        self.layers.append(entries)
        self.physical_bytes += physical_bytes

    @property
    def length(self) -> int:
        """Entries of the longest head of the longest layer."""
        return max(entries.keys.shape[1] for entries in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Bytes that this object holds."""
        return sum(entries.nbytes for entries in self.layers)

    @property
    def logical_bytes(self) -> int:
        """Bytes of the entries that later tokens can attend to."""
        total = 0
        for entries in self.layers:
            heads, slots, _ = entries.keys.shape
            kept = heads * slots if entries.counts is None else int(entries.counts.sum())
            total += entries.nbytes * kept // max(1, heads * slots)
        return total


def without_masked(layers: Sequence[MaskedLayer]) -> list[LayerEntries]:
    """Per-head presses mark entries instead of removing them: remove them, every head's own.

    Parameters
    ----------
    layers : sequence of (keys, values, masked)
        Keys and values, [1, G, C, D], all of one shape; the indices (batch, head, position) of what is masked.
        Together, because how many entries each head keeps is waited for.
    """
    keys = layers[0][0]
    _, heads, slots, dim = keys.shape
    masked = [(layer * heads + head) * slots + position for layer, (*_, (_, head, position)) in enumerate(layers)]
    keep = torch.ones(len(layers), heads, slots, dtype=torch.bool, device=keys.device)
    keep.view(-1)[torch.cat(masked).to(keys.device)] = False
    counts = keep.sum(-1).cpu()
    order = kept_indices(keep, int(counts.max()))
    found = []
    for (keys, values, _), indices, kept in zip(layers, order, counts, strict=True):
        index = indices[:, : int(kept.max()), None].expand(-1, -1, dim)
        found.append(LayerEntries(keys[0].gather(1, index), values[0].gather(1, index), kept))
    return found


def highest(keys: Tensor, values: Tensor, scores: Tensor, count: int) -> list[LayerEntries]:
    """The entries of the highest scores, in the order of kvpress's `ScorerPress.compress`, highest first.

    Parameters
    ----------
    keys, values : [1, G, C, D]
    scores : [P, G, C]
        Of P presses.
    count : int
        Entries that each head keeps.
    """
    index = scores.topk(count, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[-1])
    kept = (whole.expand(len(index), -1, -1, -1).gather(2, index).unbind() for whole in (keys, values))
    return [LayerEntries(*entries) for entries in zip(*kept, strict=True)]


def take_masked(model: PreTrainedModel) -> list[Any]:
    """The indices (batch, head, position) that a press has masked in each layer, or None; they are masked no longer."""
    taken = []
    for layer in model.model.layers:
        taken.append(getattr(layer.self_attn, "masked_key_indices", None))
        layer.self_attn.masked_key_indices = None
    return taken
