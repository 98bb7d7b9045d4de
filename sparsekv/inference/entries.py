"""Entries of a cache: which stay, and what new tokens see of them.

Shapes: B rows, G key/value heads, h = 1 or G, S new tokens, n entries held, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor


def as_attention_mask(mask: Tensor | None, module: Any) -> Tensor | None:
    """The mask as the model's attention takes it: eager attention adds it to its scores."""
    if mask is None or module.config._attn_implementation == "sdpa":
        return mask
    dtype = next(module.parameters()).dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def causal(held: Tensor, real: Tensor) -> Tensor | None:
    """Bool[B, h, S, n + S]: the new tokens see all that is held, Bool[B, h, n], and of themselves the past.

    None where the model's own causal mask says the same: `real`, Bool[B, S], and `held` are all True, and there is
    one new token or nothing is held.
    """
    new = real.shape[1]
    if (new == 1 or held.shape[-1] == 0) and bool(held.all() & real.all()):
        return None
    own = torch.ones(new, new, dtype=torch.bool, device=real.device).tril()
    own = (own & real[:, None]) | torch.eye(new, dtype=torch.bool, device=real.device)  # padding sees itself
    past = held[:, :, None].expand(-1, -1, new, -1)
    return torch.cat([past, own[:, None].expand(-1, held.shape[1], -1, -1)], dim=-1)


def right_justified(keep: Tensor) -> Tensor | None:
    """Long[…, longest]: the entries that `keep`, Bool[…, n], keeps, in order, after those that pad a short row.

    None where that would save nothing: the longest row keeps all.
    """
    longest = int(keep.sum(-1).max()) if keep.shape[-1] else 0
    if longest == keep.shape[-1]:
        return None
    return keep.to(torch.uint8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - longest :]


def take(entries: Tensor, index: Tensor) -> Tensor:
    """Entries [B, G, n, D] at `index`, Long[B, m] or Long[B, G, m]: [B, G, m, D]."""
    index = (index if index.dim() == 3 else index[:, None]).to(entries.device)
    return entries.gather(2, index[..., None].expand(-1, entries.shape[1], -1, entries.shape[3]))
