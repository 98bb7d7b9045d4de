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

from sparsekv.attention import causal_attention
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
    if not hasattr(attention, "activate_flash_attention_impl") or active():
        return
    query = torch.empty(1, heads, LENGTH, width, dtype=torch.bfloat16, device=device)
    if not packs(query, 0.0):
        return
    for name in filter(lambda name: _installed(IMPLEMENTATIONS[name]), IMPLEMENTATIONS):
        if works(partial(_activate, name, groups, query), f"attention without {name}"):
            return
        attention.restore_flash_attention_impl(_raise_warn=False)


def use_newest_for(model: PreTrainedModel) -> None:
    """`use_newest` for a model's heads; not where probabilities are dropped, which only torch's own can."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "attention_dropout", 0) or not isinstance(heads, int) or not isinstance(groups, int):
        return  # or layers differ
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    use_newest(heads, groups, width, model.device)


def active() -> str | None:
    """The one of `IMPLEMENTATIONS` that torch's flash attention runs; None for torch's own."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()


def torch_version() -> str:
    """torch's version, and whose flash attention it runs if not its own: for the captions of benchmarks."""
    return ", ".join(filter(None, (torch.__version__, active())))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it would be in
        return False


def _activate(name: str, groups: int, query: Tensor) -> None:
    """From here on torch's flash attention is `name`'s; complains when that attends otherwise."""
    rehearsals = [_rehearsal(query, groups, kind) for kind in ("even", "uneven", "causal")]
    expected = [attend() for attend in rehearsals]
    torch.nn.attention.activate_flash_attention_impl(name)
    for attend, others in zip(rehearsals, expected, strict=True):
        for found, other in zip(attend(), others, strict=True):
            off = ((found - other).abs().max() / other.abs().max()).item()
            if not off < TOLERANCE:  # NaN is not
                raise ArithmeticError(f"differs from torch's own by {off:.1g} of the largest value")


def _rehearsal(like: Tensor, groups: int, kind: str) -> Callable[[], list[Tensor]]:
    """Attention of a row, evicted or plain causal, with its gradients; every time on the same random numbers."""
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
        if kind == "causal":  # as the teacher attends
            out = causal_attention(query, key, value, None, 0.0)
        else:
            out = packed_attention(query, key, value, keeps, CUTS, COUNTS, None, kind == "even")
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (query, key, value))]

    return attend
