"""What ran: the version of the package (pyproject.toml reads it here), its commit, and what it stands on."""

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path

VERSION = "0.1.0"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package → installed version, this package first."""
    return {"sparsekv": VERSION} | {name: importlib.metadata.version(name) for name in packages}


def commit() -> str | None:
    """The commit of the checkout that the package runs from, `-dirty` if changed; None when it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:
            return None
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
