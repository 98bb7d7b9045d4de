"""Reading a model's attention while it runs: queries, keys and values at the seam, probabilities block by block.

Nothing here holds [L, L]: `causal_probabilities` yields a few queries at a time, and its reader keeps what it needs.
Shapes: B batch, H query heads, G key/value heads, L tokens, D head dimension, b queries of a block.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsekv.attention_interface import attending_by
from sparsekv.errors import UserError, gist, require

IMPLEMENTATION = "sparsekv_observed"
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}  # probabilities of a block: a CPU's cache; enough work for a GPU
MIN_BLOCK = 8  # queries, however long the sequence: below, the overhead of a block outweighs its work
PROBE_TOKENS = 4

# layer index, query [B, H, L, D], key and value [B, G, L, D] (after the rotary embedding), factor on the logits
Receiver = Callable[[int, Tensor, Tensor, Tensor, float], None]


@dataclass(frozen=True)
class _Observer:
    """What a forward pass carries to its layers. For another function a compiled layer would be compiled anew."""

    receive: Receiver
    plain_only: bool


@contextlib.contextmanager
def observing(model: nn.Module, receive: Receiver, plain_only: bool = False) -> Iterator[None]:
    """Inside, every attention layer of a forward pass calls `receive` and then attends as usual, with SDPA.

    Run `model.get_decoder()` with `use_cache=False` when only the attention is wanted: no logits are made. Contexts
    nest; the inner one receives. Everything is restored on exit, also after an exception.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    receive : callable
        Gets the layer's index, its query [B, H, L, D], key and value [B, G, L, D] and the factor on the logits. The
        tensors are the model's own: do not change them.
    plain_only : bool
        A layer with a mask of its own (padding, a sliding window) attends unobserved.

    Raises
    ------
    ValueError
        In the forward pass, where attention is not plain causal: a soft cap, learned sinks, a bias by position, an
        encoder; and, unless `plain_only`, padding or a sliding window.
    """
    base: Any = model

    def pass_on(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "observer": _Observer(receive, plain_only)}

    with attending_by(base, IMPLEMENTATION, _observed_attention):
        handle = base.get_decoder().register_forward_pre_hook(pass_on, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    observer: _Observer | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: [B, H, L, D] queries → [B, L, H, D], and no weights."""
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("attention with a soft cap, learned sinks or a bias by position cannot be observed")
    if not getattr(module, "is_causal", True):
        raise ValueError("attention that looks ahead, as an encoder's does, cannot be observed")
    if attention_mask is not None and (observer is None or not observer.plain_only):  # SDPA gets none if plain causal
        raise ValueError("attention with a mask of its own (padding, a sliding window) cannot be observed")
    if attention_mask is not None or observer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return _attend_observed(observer, module, query, key, value, scaling, **kwargs)


# In the graph of a compiled layer, a layer_idx would compile every layer by itself. It attends as well, so that nothing
# is left to do after it: torch 2.11 cannot go on in a function of another file than the layer's.
@torch.compiler.disable
def _attend_observed(
    observer: _Observer,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer: Any = module.layer_idx
    observer.receive(layer, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)


def check_observable(model: nn.Module, name: str, length: int = 1) -> None:
    """Prove with a forward pass of a few tokens that every layer's attention over `length` tokens can be captured.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    name : str
        What the user called the model, for the message.
    length : int
        Tokens of the sequences that will be observed.

    Raises
    ------
    UserError
        Names `--model` and the reason: no SDPA, layers without attention, attention that is not plain causal.
    """
    base: Any = model
    config = base.config.get_text_config()
    require(getattr(base, "_supports_sdpa", False), f"--model {name}: its attention is not SDPA and cannot be captured")
    windows = [getattr(config, field, None) for field in ("sliding_window", "attention_chunk_size")]
    window = min((w for w in windows if w), default=None)
    sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or [None])
    if window is not None and window <= length and sliding:
        raise UserError(
            f"--model {name}: has layers that see {window} tokens at most; only full attention over {length} can be "
            f"observed: sequences must be shorter than {window}"
        )
    reports: list[int] = []
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), observing(model, lambda layer, *_: reports.append(layer)):
            base.get_decoder()(input_ids=ids, use_cache=False)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model {name}: {gist(error)}") from error
    require(bool(reports), f"--model {name}: its attention does not go through transformers' attention interface")
    wrong = [str(layer) for layer in range(config.num_hidden_layers) if reports.count(layer) != 1]
    require(not wrong, f"--model {name}: layers without attention that can be captured: {', '.join(wrong)}")


def causal_probabilities(
    query: Tensor, key: Tensor, scaling: float, block: int | None = None, first: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Attention probabilities of plain causal attention, a block of queries at a time.

    Parameters
    ----------
    query : [B, H, L, D]
    key : [B, G, L, D]
        In any dtype; logits are computed in float32.
    scaling : float
        Factor on the logits.
    block : int, optional
        Queries of a block; by default as many as keep a block's size constant, so that memory does not grow with L².
    first : int
        The first query that is wanted.

    Yields
    ------
    start : int
        The block's first query.
    probabilities : Float32[B, H, b, end]
        Of the queries start … end − 1 over the keys 0 … end − 1; each row sums to 1, and is 0 after its own query.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    if key.shape[2] != length:
        raise ValueError(f"expected as many keys as queries, got query {tuple(query.shape)}, key {tuple(key.shape)}")
    elements = BLOCK_ELEMENTS.get(query.device.type, BLOCK_ELEMENTS["cuda"])
    block = min(length - first, block or max(MIN_BLOCK, elements // (batch * heads * length)))
    future = torch.ones(block, block, dtype=torch.bool, device=query.device).triu(1)
    keys = key.float().transpose(-1, -2)
    for start in range(first, length, block):
        end = min(start + block, length)
        size = end - start
        rows = (query[:, :, start:end].float() * scaling).reshape(batch, groups, -1, width)  # heads that share a key
        with torch.autocast(query.device.type, enabled=False):  # it would multiply in bfloat16
            logits = (rows @ keys[..., :end]).view(batch, heads, size, end)
        logits[..., start:].masked_fill_(future[:size, :size], -torch.inf)
        yield start, logits.softmax(-1)


def expected_attention(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Attention that each position would receive if every query spread it evenly over the tokens it sees.

    expected[k] = Σ_{q ≥ k} 1/(q + 1), the exposure that sums are divided by; the sum over k is `length`.

    Returns
    -------
    Float64[L]
    """
    even = 1 / torch.arange(1, length + 1, dtype=torch.float64, device=device)
    return even.flip(0).cumsum(0).flip(0)


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that each position receives from all queries, as a multiple of its expected attention.

    relative[k] = Σ_{q ≥ k} P[q, k] / expected[k]; uniform causal attention gives 1 everywhere.

    Parameters
    ----------
    query : [B, H, L, D]
    key : [B, G, L, D]
    scaling : float
        Factor on the logits.

    Returns
    -------
    Float32[B, H, L]
    """
    received = query.new_zeros(query.shape[:3], dtype=torch.float32)
    for start, probabilities in causal_probabilities(query, key, scaling):
        received[..., : start + probabilities.shape[2]] += probabilities.sum(2)
    return received / expected_attention(query.shape[2], query.device).float()
