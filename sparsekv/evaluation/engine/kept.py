"""Which context entries a press has kept: read from its cache, whatever the press and however it chose.

Shapes: G key/value heads, C context tokens, n entries kept, D head dimension.
"""

import torch
from torch import Tensor

from sparsekv.evaluation.engine.evicted import EvictedCache, LayerEntries

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_ENTRY = torch.iinfo(torch.int64).max


def kept_positions(full: EvictedCache, evicted: EvictedCache) -> Tensor:
    """Bool[layers, G, C] on the CPU: True where a head of a layer holds the context's entry.

    An entry is known by its key: after the rotary embedding no two positions have the same one. Keys are compared bit
    by bit, by a 64-bit hash of each, so both caches must come from the same forward pass, or from equal ones. Channels
    that are zero in all of a head's keys (ThinK removes them) are left out of the comparison.

    Parameters
    ----------
    full : EvictedCache
        Of the whole context, without a press.
    evicted : EvictedCache
        Of the same context, after a press.

    Raises
    ------
    ValueError
        In one line, where the entries cannot be told: keys that a press changed, added or computed anew.
    """
    return torch.stack(
        [_kept_of_layer(*layers, layer) for layer, layers in enumerate(zip(full.layers, evicted.layers, strict=True))]
    )


def _kept_of_layer(full: LayerEntries, evicted: LayerEntries, layer: int) -> Tensor:
    """Bool[G, C] of one layer."""
    heads, slots, _ = evicted.keys.shape
    counts = torch.full((heads,), slots) if evicted.counts is None else evicted.counts.cpu()
    holds = (torch.arange(slots) < counts[:, None]).to(evicted.keys.device)
    removed = ((evicted.keys == 0) | ~holds[..., None]).all(1, keepdim=True)
    context = _hash_rows(full.keys.masked_fill(removed, 0))
    held = _hash_rows(evicted.keys.masked_fill(removed, 0)).masked_fill(~holds, _NO_ENTRY)
    copies, copies_held = _count_among(context, context), _count_among(context, held)
    kept = (copies_held > 0).cpu()
    # Equal keys can be told apart only where all of them are kept, or none.
    equal = ((copies_held == copies) | (copies_held == 0)).all()
    if not equal or not torch.equal(kept.sum(-1), counts):
        raise ValueError(f"what it keeps in layer {layer} cannot be told by its keys")
    return kept


def _hash_rows(keys: Tensor) -> Tensor:
    """[G, n, D] → Int64[G, n]: a random linear function of the bits, modulo 2⁶⁴."""
    bits = keys.contiguous().view(_BITS[keys.element_size()]).long()
    factors = torch.randint(2**62, bits.shape[-1:], generator=torch.Generator().manual_seed(0))
    return (bits * (2 * factors + 1).to(bits.device)).sum(-1)


def _count_among(entries: Tensor, others: Tensor) -> Tensor:
    """Int64[G, C]: how often each of a head's entries, [G, C], occurs among its others, [G, n]."""
    ordered = others.sort(-1).values
    return torch.searchsorted(ordered, entries, right=True) - torch.searchsorted(ordered, entries)
