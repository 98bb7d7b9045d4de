"""A forward pass over entries of a fixed size; on a GPU, that of one token as a CUDA graph.

A smaller cache is a faster step only where kernels are not waited for: a graph launches them all at once. What stays
then are many small kernels between the large ones; `torch.compile` makes few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsekv.cuda_graph import capture
from sparsekv.inference.static_attention import Entries, NewEntries, StaticPass, serving


class StaticStep:
    """Hidden states of new tokens, again and again over the same tensors.

    Parameters
    ----------
    decoder : nn.Module
        The model without its head, its attention layers numbered.
    forward : callable
        Its own forward pass.
    entries : Entries
    lengths : Long[B]
        Entries that each row holds. A pass adds its real tokens.
    compiled : bool
        Compile the decoder's layers for one-token steps. For the first step with a batch size this takes seconds.
    """

    def __init__(
        self, decoder: Any, forward: Callable[..., Any], entries: Entries, lengths: Tensor, compiled: bool
    ) -> None:
        self.decoder, self.forward, self.entries, self.lengths = decoder, forward, entries, lengths
        self.calls = [torch.compile(layer._call_impl, dynamic=False) for layer in decoder.layers] if compiled else []
        self.graph: torch.cuda.CUDAGraph | None = None
        self._may_capture = lengths.is_cuda

    def __call__(self, ids: Tensor, real: Tensor, positions: Tensor) -> Tensor:
        """One pass: Long[B, S] tokens, Bool[B, S] False at padding, Long[B, S] positions; returns [B, S, hidden].

        What a one-token step returns is overwritten by the next.
        """
        with torch.cuda.device_of(self.lengths), torch.inference_mode(False), torch.no_grad():
            if ids.shape[1] == 1 and self.graph is None and self._may_capture:
                self._capture(ids, real, positions)
            if ids.shape[1] > 1 or self.graph is None:
                return self._run(ids, real, positions)
            for held, given in zip(self._inputs, (ids, real, positions), strict=True):
                held.copy_(given)
            self.graph.replay()
            return self._hidden

    def _run(self, ids: Tensor, real: Tensor, positions: Tensor, *, last: bool = True) -> Tensor:
        """The pass as it is; lengths stay if it is not the last with these tokens."""
        started = StaticPass.of(self.entries, self.lengths, real)
        calls = self.calls if ids.shape[1] == 1 else []
        with serving(self.decoder.config, started), _running(self.decoder.layers, calls):
            output = self.forward(input_ids=ids, position_ids=positions, past_key_values=NewEntries(), use_cache=True)
        if last:
            self.lengths += real.sum(-1)
        return output.last_hidden_state

    def _capture(self, *inputs: Tensor) -> None:
        """Record the step, if the model allows it."""
        self._inputs = [tensor.clone() for tensor in inputs]
        captured = capture(lambda: self._run(*self._inputs, last=False), lambda: self._run(*self._inputs))
        if captured is None:
            self._may_capture = False
        else:
            self.graph, self._hidden = captured


@contextmanager
def _running(layers: Any, calls: list[Any]) -> Iterator[None]:
    """Inside, the layers run as `torch.compile` has made them, if it has: one compilation for all of them."""
    before = [layer._compiled_call_impl for layer in layers]
    for layer, call in zip(layers, calls, strict=False):
        layer._compiled_call_impl = call
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call
