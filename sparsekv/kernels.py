"""Whether a kernel that torch does not bring works on this machine: one of ours in Triton, or another package's."""

import logging
from collections.abc import Callable

from sparsekv.errors import gist

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
        logger.warning("%s: %s", instead, gist(error))
        return False
    return True
