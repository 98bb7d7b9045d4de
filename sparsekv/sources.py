"""Where documents come from: files, a Hub dataset, or the text that Python itself carries."""

import ast
import functools
import hashlib
import importlib
import json
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, constants

from sparsekv.errors import UserError, gist
from sparsekv.files import TEXT_SUFFIXES, cache_folder, keep_in_cache

PYDOC = "pydoc"
SHUFFLE_BUFFER = 256  # documents held in memory to shuffle a stream
_DOCSTRINGS_VERSION = 1  # one more whenever `_docstrings` finds something else in the same file
_UNDOCUMENTED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "turtledemo"}


def documents(name: str, seed: int, data_subset: str | None) -> Iterator[str]:
    """The documents of a source, in an order fixed by `seed`; nothing is read before it is asked for."""
    if name == PYDOC:
        parts = [*_topics(), *_library_files()]
        random.Random(seed).shuffle(parts)
        stream = datasets.IterableDataset.from_generator(_read_pydoc, gen_kwargs={"parts": parts})
    elif is_path(name):
        files = _text_files(Path(name).expanduser())
        stream = datasets.IterableDataset.from_generator(_read_files, gen_kwargs={"files": files})
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    else:
        stream = _hub_stream(name, data_subset).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return (record["text"] for record in stream if record["text"] and record["text"].strip())


def is_path(name: str) -> bool:
    """Whether a source is a file or folder here, and so no Hub dataset."""
    return Path(name).expanduser().exists()


def _text_files(path: Path) -> list[str]:
    """The text files at `path`, sorted; raises UserError for an empty file, a wrong kind, or none at all."""
    if path.is_file() and path.suffix not in TEXT_SUFFIXES:
        raise UserError(
            f"--data {path}: its kind is not known; give a {', '.join(TEXT_SUFFIXES)} file or a folder of them"
        )
    files = (
        [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file())
    )
    if not files:
        raise UserError(f"--data {path}: the folder holds no {', '.join(TEXT_SUFFIXES)} file")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"--data {file}: the file is empty")
    return [str(file) for file in files]


def _read_files(files: list[str]) -> Iterator[dict[str, str]]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for file in files:
        try:
            for text in readers[Path(file).suffix](file):
                yield {"text": text}
        except UnicodeDecodeError as error:
            raise UserError(f"--data {file}: it is not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error
        except OSError as error:
            raise UserError(f"--data {file}: it cannot be read ({error.strerror or error})") from error


def _read_txt(file: str) -> Iterator[str]:
    text = Path(file).read_text("utf-8-sig")
    if not text.strip():
        raise UserError(f"--data {file}: the file is empty")
    yield text


def _read_jsonl(file: str) -> Iterator[str]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or error
                raise UserError(f"--data {file}, line {number}: it is not JSON ({reason})") from error
            if not isinstance(record, dict) or not is_text(record.get("text")):
                raise UserError(f'--data {file}, line {number}: it has no "text" field that holds Unicode text')
            yield record["text"]


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can write: JSON can also spell lone halves of surrogate pairs."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def _read_parquet(file: str) -> Iterator[str]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"--data {file}: it is not a parquet file") from error
    with table:
        names = table.schema_arrow.names
        kind = table.schema_arrow.field("text").type if "text" in names else pa.null()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f'--data {file}: it has no string column "text"; it has {", ".join(names)}')
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text is not None)


def _hub_stream(name: str, data_subset: str | None) -> datasets.IterableDataset:
    """A Hub dataset's training split, streamed (or read from the datasets cache when HF_HUB_OFFLINE is set)."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or name.endswith(TEXT_SUFFIXES):
        raise UserError(f"--data {name}: no such file or folder; give pydoc, recall, a path or a Hub dataset")
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=10)  # one quick request: load_dataset alone retries for 20 s and more
        stream = datasets.load_dataset(name, data_subset, split="train", streaming=True)
        columns = stream.column_names or list(next(iter(stream)))
    except Exception as error:  # the Hub's client raises a dozen unrelated kinds
        subset = f" --data_subset {data_subset}" if data_subset else ""
        given = f"--data {name}{subset}"
        raise UserError(
            f"{given}: neither pydoc, recall, a path, nor a Hub dataset that can be reached ({gist(error)})"
        ) from error
    if "text" not in columns:
        raise UserError(f'--data {name}: it has no column "text"; it has {", ".join(columns)}')
    return stream


# The text that Python itself carries


def _topics() -> list[str]:
    try:
        return sorted(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:  # some distributions ship Python without its reference
        return []


def _library_files() -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in _UNDOCUMENTED]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _read_pydoc(parts: list[str]) -> Iterator[dict[str, str]]:
    """Topics of the language reference, by name, and the docstrings of library files, by path."""
    for part in parts:
        if part.endswith(".py"):
            yield {"text": _library_docstrings()[part]}
        else:
            yield {"text": importlib.import_module("pydoc_data.topics").topics[part]}


@functools.cache
def _library_docstrings() -> dict[str, str]:
    """The docstrings of every library file, by path, from the disk cache when these files were seen before.

    Parsing them takes seconds, in each process that makes a benchmark's rows.
    """
    files = _library_files()
    seen = [(file, stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(file)]]
    key = hashlib.sha256(repr((_DOCSTRINGS_VERSION, sys.version, seen)).encode()).hexdigest()
    path = cache_folder() / "pydoc" / f"{key}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        if list(found) == files:
            return found
    except (OSError, ValueError):  # not there, or damaged
        pass
    found = {file: _docstrings(Path(file), _module_name(file)) for file in files}
    keep_in_cache(path, json.dumps(found).encode())
    return found


def _module_name(file: str) -> str:
    path = Path(file).relative_to(sysconfig.get_path("stdlib")).with_suffix("")
    return ".".join(path.parts).removesuffix(".__init__")


def _docstrings(file: Path, module: str) -> str:
    """The docstrings of a source file under the names they document; parsed, never imported."""
    source = file.read_bytes()
    if b'"""' not in source:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a library may carry files that are broken on purpose
        return ""
    sections = []
    stack: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if doc := ast.get_docstring(node):
            sections.append(f"{name}\n\n{doc}")
        for child in reversed(node.body):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{name}.{child.name}", child))
    return "\n\n".join(sections)
