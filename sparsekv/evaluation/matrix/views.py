"""A context as presses see it: its tokens, what each press keeps of them, and what they attend to. The report draws it.

A view is one gzipped JSON file; arrays are base64, of booleans the packed bits. `docs/evaluation.md` has the schema.
"""

import base64
import gzip
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from sparsekv.errors import UserError, require
from sparsekv.files import write_bytes

SCHEMA_VERSION = 1

Bits: TypeAlias = NDArray[np.bool_]
Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class KeptEntries:
    """What a press keeps at a ratio: Bool[layers, G, C]."""

    press: str
    compression_ratio: float
    kept: Bits


@dataclass(frozen=True)
class NotShown:
    """A cell without a picture, and why, in one line."""

    press: str
    compression_ratio: float
    reason: str


@dataclass(frozen=True)
class View:
    """One context of a benchmark under every press. G key/value heads, C context tokens.

    Attributes
    ----------
    benchmark, data_dir : str
        As `sparsekv.evaluation.comparison.results` names them.
    model, adapter : str
        The adapter of an untrained model is "".
    task, row
        Of the first question about the context; its number in predictions.csv.
    fingerprint : str
        Of all that decided the content, but for the cells.
    commit : str
    question : str
    answer : list of str
    tokens : list of str
        Text of each of the C tokens; together they are the context's text. A character that several tokens share
        belongs to the last of them.
    classes : UInt8[C]
        A `sparsekv.tokens.TokenClass` each.
    anchors : Bool[C]
        By `AnchorConfig()`.
    received : UInt8[layers, G, C]
        Attention of the whole context, see `encode_received`.
    cells : list of KeptEntries
    not_shown : list of NotShown
    """

    benchmark: str
    data_dir: str
    model: str
    adapter: str
    task: str
    row: int
    fingerprint: str
    commit: str
    question: str
    answer: list[str]
    tokens: list[str]
    classes: Bytes
    anchors: Bits
    received: Bytes
    cells: list[KeptEntries]
    not_shown: list[NotShown]


def encode_received(relative: NDArray[np.floating]) -> Bytes:
    """A multiple of uniform attention in a byte: 128 + 16 · log2, so 1 is 128, 2⁻⁸ … 2⁸ fit, in steps of 4%."""
    with np.errstate(divide="ignore"):
        return np.clip(np.round(128 + 16 * np.log2(relative)), 0, 255).astype(np.uint8)


def save_view(path: Path, view: View) -> None:
    """Write a view whole; the same view gives the same bytes."""
    layers, kv_heads, _ = view.received.shape
    content = {
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(view, name) for name in _PLAIN},
        "layers": layers,
        "kv_heads": kv_heads,
        "classes": _as_text(view.classes),
        "anchors": _as_text(np.packbits(view.anchors)),
        "received": _as_text(view.received),
        "cells": [{**vars(cell), "kept": _as_text(np.packbits(cell.kept))} for cell in view.cells],
        "not_shown": [vars(cell) for cell in view.not_shown],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write_bytes(path, gzip.compress(text.encode("utf-8", "surrogatepass"), mtime=0))


def load_view(path: Path) -> View:
    """Read a view.

    Raises
    ------
    UserError
        Names the file: it is corrupt, or of another schema version.
    """
    again = f"delete {path} and run the same `sparsekv eval` again"
    try:
        content = json.loads(gzip.decompress(path.read_bytes()).decode("utf-8", "surrogatepass"))
        version = content["schema_version"]
        require(
            version == SCHEMA_VERSION,
            f"{path}: has schema_version {version}, this version reads {SCHEMA_VERSION}; {again}",
        )
        return _decode(content)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path}: corrupt ({reason}); {again}") from error


def _decode(content: dict[str, Any]) -> View:
    for name, kind in _PLAIN.items():
        if not isinstance(content[name], kind):
            raise TypeError(f"{name} is {type(content[name]).__name__}")
    tokens = len(content["tokens"])
    shape = (content["layers"], content["kv_heads"], tokens)
    return View(
        **{name: content[name] for name in _PLAIN},
        classes=_bytes(content["classes"], (tokens,)),
        anchors=_bits(content["anchors"], (tokens,)),
        received=_bytes(content["received"], shape),
        cells=[KeptEntries(**{**cell, "kept": _bits(cell["kept"], shape)}) for cell in content["cells"]],
        not_shown=[NotShown(**cell) for cell in content["not_shown"]],
    )


_PLAIN: dict[str, type] = {
    **dict.fromkeys(("benchmark", "data_dir", "model", "adapter", "task"), str),
    "row": int,
    **dict.fromkeys(("fingerprint", "commit", "question"), str),
    **dict.fromkeys(("answer", "tokens"), list),
}


def _as_text(array: Bytes) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _bytes(text: str, shape: tuple[int, ...]) -> Bytes:
    return np.frombuffer(base64.b64decode(text, validate=True), np.uint8).reshape(shape)


def _bits(text: str, shape: tuple[int, ...]) -> Bits:
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    count = math.prod(shape)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} bits")
    return cast(Bits, np.unpackbits(packed, count=count).astype(bool).reshape(shape))
