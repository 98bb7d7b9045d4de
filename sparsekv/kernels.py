"""Whether a kernel that torch does not bring works on this machine: one of ours in Triton, or another package's."""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


def works(rehearse: Callable[[], object], instead: str) -> bool:
    """Whether a first call of a kernel succeeds: it may want a C compiler, as Triton does, or another version of torch.

    Parameters
    ----------
    rehearse : callable
        Imports the kernel and calls it.
    instead : str
        What happens without it, for the one line that is logged then.
    """
    try:
        rehearse()
    except Exception as error:  # Triton has errors of many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("%s: %s", instead, lines[0])
        return False
    return True
