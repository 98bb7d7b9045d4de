"""What a training step must cost, and what its parts do cost."""

import contextlib
import time
from collections import defaultdict
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from sparsekv.training.meter import PEAK_FLOPS


def step_flops(base: nn.Module, batch: int, length: int) -> float:
    """Floating-point operations of a step with an adapter, of `batch` rows of `length` tokens.

    Per token, 2 for each parameter P of the decoder (without the embedding) and A of the adapter in each of three
    passes: teacher, student, and the gradient of activations. The adapter has no teacher but a gradient of its weights:

        6·(P + A)·tokens

    Causal attention multiplies half of L × L twice in a forward pass (queries × keys, probabilities × values), and five
    times in a backward pass that makes the probabilities anew. Teacher, student and gradient: 2 + 2 + 5 = 9 products of
    2·½·L²·heads·width operations:

        9·L²·heads·width·layers·batch

    The head, once for each pass, on every token:

        6·hidden·vocabulary·tokens

    That is a step with the full cache and a loss on all tokens. An evicted step computes less attention, and tokens
    before the first cut reach no head; scores, and what checkpointing recomputes, are not counted.
    """
    config = base.config
    embedding = base.get_input_embeddings().weight
    tokens = batch * length
    parameters = sum(weight.numel() for weight in base.get_decoder().parameters()) - embedding.numel()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 9 * length**2 * width * config.num_hidden_layers * batch
    return 6 * parameters * tokens + attention + 6 * embedding.numel() * tokens


def matrix_rate(device: str) -> float:
    """FLOP/s of a large product: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    repeats = 20
    for count in (5, repeats):  # the first warm up
        start = synchronized()
        for _ in range(count):
            left @ right
        seconds = synchronized() - start
    return 2 * size**3 * repeats / seconds


def peak_rate(device: str) -> float | None:
    """FLOP/s by the maker's data sheet; None where that is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what it says: torch.compile wraps such an error in its own, and libraries have theirs."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def synchronized() -> float:
    """The time at which the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Time by part, each without the parts inside of it; what belongs to none is `rest`.

    On a GPU the marks are CUDA events, so that nothing waits for them. Used as a context: on exit the functions that it
    watches are as they were.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self._open = ["rest"]
        self._marks: list[tuple[str, Any]] = []
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def start(self, functions: dict[str, tuple[Any, str]]) -> None:
        """From now on: part → the object that has the function, and its name there."""
        for part, (owner, name) in functions.items():
            self._patches.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), part)))
        self._mark()

    def stop(self) -> dict[str, float]:
        """Seconds by part since the start."""
        self._mark()
        synchronized()
        seconds: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        return seconds

    def _mark(self) -> None:
        mark: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            mark.record()
        self._marks.append((self._open[-1], mark))

    def _timed(self, function: Any, part: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._open.append(part)
            self._mark()
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()
                self._mark()

        return timed
