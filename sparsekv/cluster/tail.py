"""The end of a log."""

import os
from pathlib import Path

BYTES = 8192


def last_lines(path: str | Path, count: int = 5) -> list[str]:
    """The last lines that say something; a progress bar's last state counts as a line. None where there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return ["".join(char for char in line if char.isprintable()) for line in lines if line.strip()][-count:]
