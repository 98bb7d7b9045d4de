"""Flash attention by kernels made for the GPU at hand, where they are installed; torch's own are FlashAttention-2's.

torch can let its flash attention run FlashAttention-3 or -4 (`torch.nn.attention.activate_flash_attention_impl`, from
2.11), and finds out whether that works when a layer attends. Here it is found out before.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.attention
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.kernels import works
from sparsekv.packed_attention import packed_attention, packs

IMPLEMENTATIONS = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}  # torch's name for it, and its module
LENGTH, CUTS, COUNTS = 256, (100, 180), (50, 60)
TOLERANCE = 0.02  # of the largest: what bfloat16 rounds, and far from another mask


def use_newest(heads: int, groups: int, width: int, device: torch.device) -> None:
    """Activate the first of `IMPLEMENTATIONS` that is installed, if it does what torch's own does.

    One line is logged where it does not; nothing happens where none is installed, or another one is active.

    Parameters
    ----------
    heads, groups, width : int
        Query heads, key/value heads and their dimension, for which it is tried, in bfloat16.
    device : torch.device
    """
    attention = torch.nn.attention
    if not hasattr(attention, "activate_flash_attention_impl") or attention.current_flash_attention_impl():
        return
    query = torch.empty(1, heads, LENGTH, width, dtype=torch.bfloat16, device=device)
    if not packs(query, 0.0):
        return
    for name in filter(lambda name: _installed(IMPLEMENTATIONS[name]), IMPLEMENTATIONS):
        if works(partial(_activate, name, groups, query), f"attention without {name}"):
            return
        attention.restore_flash_attention_impl(_raise_warn=False)


def attention_shape(model: PreTrainedModel) -> tuple[int, int, int, torch.device]:
    """Query heads, key/value heads, their dimension and the device of a model; one head where layers differ."""
    config = model.config.get_text_config()

    def number(name: str, otherwise: int) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) else otherwise

    heads = number("num_attention_heads", 1)
    return heads, number("num_key_value_heads", heads), number("head_dim", config.hidden_size // heads), model.device


def newest() -> str:
    """The name of what is active, as it stands in the caption of a benchmark; empty for torch's own."""
    name = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return f", {name}" if name else ""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it would be in
        return False


def _activate(name: str, groups: int, query: Tensor) -> None:
    """From here on torch's flash attention is `name`'s; complains when that attends otherwise."""
    rehearsals = [_rehearsal(query, groups, even) for even in (True, False)]
    expected = [attend() for attend in rehearsals]
    torch.nn.attention.activate_flash_attention_impl(name)
    for attend, others in zip(rehearsals, expected, strict=True):
        for found, other in zip(attend(), others, strict=True):
            off = ((found - other).abs().max() / other.abs().max()).item()
            if not off < TOLERANCE:  # NaN is not
                raise ArithmeticError(f"differs from torch's own by {off:.1g} of the largest value")


def _rehearsal(like: Tensor, groups: int, even: bool) -> Callable[[], list[Tensor]]:
    """An evicted row's attention with its gradients, every time on the same random numbers."""
    generator = torch.Generator(like.device).manual_seed(0)

    def heads(count: int) -> Tensor:
        numbers = torch.randn(1, count, *like.shape[2:], device=like.device, generator=generator)
        return numbers.to(like.dtype).requires_grad_()

    query, key, value = heads(like.shape[1]), heads(groups), heads(groups)
    keeps = [
        torch.rand(1, groups, cut, device=like.device, generator=generator).argsort(-1) < count
        for cut, count in zip(CUTS, COUNTS, strict=True)
    ]

    def attend() -> list[Tensor]:
        out = packed_attention(query, key, value, keeps, CUTS, COUNTS, None, even)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (query, key, value))]

    return attend
