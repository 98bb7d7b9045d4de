"""Whether two folders hold the same model, in seconds, and whether two things were made from the same."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WHOLE = 2**28  # bytes; of a larger file as much is read, in pieces spread evenly
PIECES = 256
# Whatever decides an answer: weights, configurations, the tokenizer with its templates, a model's own code.
DECISIVE = (
    *("*config.json", "*.safetensors", "tokenizer*", "vocab*", "merges*", "*.model", "special_tokens_map.json"),
    *("chat_template*", "*.jinja", "*/*.jinja", "*.py"),
)


def fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of the weights, configurations, tokenizer and code in a folder of a model or an adapter."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in DECISIVE for file in folder.glob(pattern) if file.is_file()}):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint_of(content: Any) -> str:
    """SHA-256 (hex) of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _pieces(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            yield from iter(lambda: stream.read(2**20), b"")
            return
        for number in range(PIECES):
            stream.seek(number * (size - WHOLE // PIECES) // (PIECES - 1))
            yield stream.read(WHOLE // PIECES)
