"""Predictions as they come: one JSON a line, one file a process, so that a kill loses the batch in flight at most."""

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsekv.errors import UserError

PATTERN = "journal-*.jsonl"
COSTS = ("num_tokens", "kv_bytes", "prefill_seconds", "decode_seconds", "peak_memory_bytes", "device")
KEYS = {"row", "generation", "text", "nll", "kl", *COSTS}  # of a prediction


class Journal:
    """The predictions of a cell that is not finished yet, of all processes.

    Parameters
    ----------
    folder : Path
        The cell's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own = folder / PATTERN.replace("*", uuid.uuid4().hex[:12])
        self._read: dict[Path, int] = {}  # bytes of each file that `news` has given

    def files(self) -> list[Path]:
        """The files of all processes."""
        return sorted(path for path in self.folder.glob(PATTERN) if not path.is_dir())

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records to this process's file; they are on the disk when this returns."""
        with self._own.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def news(self) -> list[dict[str, Any]]:
        """What any process has added since the last call.

        A last line without its end was torn by a kill, or is being written: it is left out.

        Raises
        ------
        UserError
            Names the file and line that is not a prediction.
        """
        return [record for file in self.files() for record in self._news_of(file)]

    def _news_of(self, file: Path) -> list[dict[str, Any]]:
        start = self._read.get(file, 0)
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                whole, end, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:  # another process has just finished the cell
            return []
        self._read[file] = start + len(whole) + len(end)
        return [_parse(line, file) for line in whole.splitlines()]


def _parse(line: bytes, file: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
        whole = record.keys() >= KEYS and isinstance(record["kv_bytes"], dict)
        if not (whole and isinstance(record["row"], int) and isinstance(record["generation"], int)):
            raise TypeError
    except (ValueError, TypeError, AttributeError) as error:
        start = line[:40].decode("utf-8", "replace")
        raise UserError(f"{file}: corrupt, {start!r} is no prediction; delete {file.parent} to do it again") from error
    return record
