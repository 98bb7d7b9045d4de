"""A step over tensors that stay, as a CUDA graph: all its kernels are launched at once."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def capture(rehearse: Callable[[], Tensor], step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
    """Record a step that reads and writes the same tensors each time; it runs when the graph is replayed.

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
        torch.cuda.set_sync_debug_mode("error")
        rehearse()
        torch.cuda.set_sync_debug_mode(waits)
        with torch.cuda.graph(graph):
            output = step()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.warning("decoding without a CUDA graph: %s", str(error).splitlines()[0])
        return None
    finally:
        torch.cuda.set_sync_debug_mode(waits)
    return graph, output
