"""A step over tensors that stay, as a CUDA graph: all its kernels are launched at once."""

import functools
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from sparsekv.errors import gist

logger = logging.getLogger(__name__)


def capture(rehearse: Callable[[], Tensor], step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
    """Record a step that reads and writes the same tensors each time; it runs when the graph is replayed.

    The tensors lie on the current CUDA device: what runs on another one would not be recorded.

    Parameters
    ----------
    rehearse : callable
        Does what `step` does and can be repeated. It runs twice: first to choose and compile kernels; then where
        waiting for the GPU is an error, as in a capture. A capture that fails would leave PyTorch's generator of random
        numbers in the middle of it, and no later draw would work.
    step : callable
        Returns a tensor, which every replay overwrites.

    Returns
    -------
    graph, its tensor
        Or None, with a warning, for a model that cannot be recorded: one that asks the GPU for a number.

    Raises
    ------
    torch.cuda.OutOfMemoryError
    """
    graph, waits = torch.cuda.CUDAGraph(), torch.cuda.get_sync_debug_mode()
    try:
        rehearse()
        _when_waiting("error")
        rehearse()
        _when_waiting(waits)
        with torch.cuda.graph(graph, stream=_capture_stream(torch.cuda.current_device())):
            output = step()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.warning("decoding without a CUDA graph: %s", gist(error))
        return None
    finally:
        _when_waiting(waits)
    return graph, output


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One stream for all captures on a device: cuBLAS keeps 32 MiB for each stream it has seen.

    PyTorch's own is one of the first device that captured.
    """
    return torch.cuda.Stream(device)


def _when_waiting(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode(mode)
