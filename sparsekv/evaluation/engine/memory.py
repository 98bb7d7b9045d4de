"""How much memory there is for caches, and what its end looks like."""

import psutil
import torch

GIB = 2**30


def default_budget(device: torch.device) -> int:
    """Bytes for caches: eight tenths of what is free on a GPU now (the model is loaded), a quarter of free host memory.

    The rest is for activations, logits and everybody else.
    """
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    return int(0.25 * psutil.virtual_memory().available)


def held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that other processes hold; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
