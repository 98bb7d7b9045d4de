"""Uniform draws that are a function of what they are for: row, layer, context, head and position.

A counter-based generator: every draw is a hash of its place, so that it depends neither on the batch nor on any state,
is the same on every device, and all of a layer's draws are made at once on its own.
"""

import functools
from typing import Any

import torch
from torch import Tensor

POSITION_BITS = 20  # heads above them
LOW_BITS = 24  # of a row's seed, which has 48


def uniform_draws(streams: Tensor, num_heads: int, length: int) -> Tensor:
    """Independent draws from [0, 1), in steps of 2⁻²⁴.

    Parameters
    ----------
    streams : Long[B]
        Of each row, from `row_streams`.
    num_heads, length : int
        H and L.

    Returns
    -------
    Float32[B, H, L]
        On the device of `streams`.
    """
    return (_mix(streams[:, None, None] ^ _places(num_heads, length, streams.device)) >> 8).float() / 2**24


def row_streams(row_seeds: Tensor, layers: int | Tensor, lengths: int | Tensor) -> Tensor:
    """What tells the draws of a row, layer and context from all others.

    Parameters
    ----------
    row_seeds : Long[B]
        In [0, 2⁴⁸).
    layers : int or Long[N, 1]
    lengths : int or Long[B]
        Tokens of each row's context: another cut draws anew.

    Returns
    -------
    Long[B] or Long[N, B]
    """
    stream = _mix(layers * 65_537 + lengths)
    for part in (row_seeds >> LOW_BITS, row_seeds & (2**LOW_BITS - 1)):
        stream = _mix(stream ^ part)
    return stream


@functools.lru_cache(maxsize=8)  # the same in every layer
@torch.inference_mode(False)  # what is made in there could not be used outside
def _places(num_heads: int, length: int, device: torch.device) -> Tensor:
    """Long[H, L]: a hash of each head and position."""
    heads = torch.arange(num_heads, device=device)[:, None] << POSITION_BITS
    places: Tensor = _mix(heads + torch.arange(length, device=device))
    return places


def _mix(x: Any) -> Any:
    """A bijective hash of 32-bit numbers, each an int or in a Long tensor, in which every bit depends on every bit.

    The two-round function 15-2c1b3c6d-12-297a2d39-15 of https://github.com/skeeto/hash-prospector: its factors are
    below 2³¹, so that no product overflows.
    """
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFF_FFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFF_FFFF
    return x ^ (x >> 15)
