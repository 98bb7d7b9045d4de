"""Uniform draws that are a function of what they are for: row, layer, context, head and position.

A counter-based generator: every draw is a hash of its place, so that it depends neither on the batch nor on any state,
is the same on every device, and all of a layer's draws are made at once on its own.
"""

from typing import Any

import torch
from torch import Tensor

POSITION_BITS = 20  # heads above them
LOW_BITS = 24  # of a row's seed, which has 48


def uniform_draws(row_seeds: Tensor, layer: int, lengths: int | Tensor, num_heads: int, length: int) -> Tensor:
    """Independent draws from [0, 1), in steps of 2⁻²⁴.

    Parameters
    ----------
    row_seeds : Long[B]
        In [0, 2⁴⁸).
    layer : int
    lengths : int or Long[B]
        Tokens of each row's context: another cut draws anew.
    num_heads, length : int
        H and L.

    Returns
    -------
    Float32[B, H, L]
        On the device of `row_seeds`.
    """
    stream = _mix(layer * 65_537 + lengths)
    for part in (row_seeds >> LOW_BITS, row_seeds & (2**LOW_BITS - 1)):
        stream = _mix(stream ^ part)
    heads = torch.arange(num_heads, device=row_seeds.device)[:, None] << POSITION_BITS
    places = _mix(heads + torch.arange(length, device=row_seeds.device))
    return (_mix(stream[:, None, None] ^ places) >> 8).float() / 2**24


def _mix(x: Any) -> Any:
    """A bijective hash of 32-bit numbers, each an int or in a Long tensor, in which every bit depends on every bit.

    The two-round function 15-2c1b3c6d-12-297a2d39-15 of https://github.com/skeeto/hash-prospector: its factors are
    below 2³¹, so that no product overflows.
    """
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFF_FFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFF_FFFF
    return x ^ (x >> 15)
