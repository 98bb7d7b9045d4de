"""Packages that only some scores need."""

import functools
import importlib
import logging
import warnings
from types import ModuleType

from sparsekv.errors import UserError


@functools.cache
def package(name: str) -> ModuleType:
    """Import a package of the extra `eval`; raises UserError with the command that installs it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba has invalid escapes, which Python 3.12 tells of
            module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--benchmark: its score needs the package {name.split('.')[0]}, which is not installed; "
            "run: pip install 'sparsekv[eval]'"
        ) from error
    if name == "jieba":
        module.setLogLevel(logging.WARNING)
    return module
