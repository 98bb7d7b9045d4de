"""Rows whose later part stands further away than it does: distances that no row is long enough to have.

A jump in the rotary embedding's positions is all that differs (PoSE, Zhu et al., https://arxiv.org/abs/2309.10400). The
model gets no `position_ids`: transformers takes ids that jump for several sequences in one row, and hides one from the
other.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv.errors import UserError


@contextlib.contextmanager
def position_gap(model: PreTrainedModel, start: int, gap: int) -> Iterator[None]:
    """Inside, positions from `start` on are `gap` larger, to every layer and to presses that ask for later positions.

    Raises
    ------
    UserError
        The decoder has no rotary embedding of its own.
    """
    if not gap:
        yield
        return

    def shift(rotary: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _shifted(kwargs["position_ids"], start, gap)}
        hidden, position_ids, *others = args
        return (hidden, _shifted(position_ids, start, gap), *others), kwargs

    with contextlib.ExitStack() as stack:
        for rotary in _rotary_embeddings(model):
            stack.callback(rotary.register_forward_pre_hook(shift, with_kwargs=True).remove)
        yield


def _shifted(position_ids: Tensor, start: int, gap: int) -> Tensor:
    """Long[B, L] → Long[B, L]."""
    return position_ids + gap * (position_ids >= start)


def _rotary_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    found = [part for part in model.get_decoder().children() if type(part).__name__.endswith("RotaryEmbedding")]
    if not found:
        raise UserError(f"--position_gap: {type(model).__name__} has no rotary embedding in its decoder; give 0")
    return found
