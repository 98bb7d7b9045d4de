"""From text to rows of tokens: read sources, split by document, tokenize, pack, mix."""

import ast
import hashlib
import importlib
import json
import logging
import math
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, constants
from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError
from sparsekv.recall import recall_rows

logger = logging.getLogger(__name__)

PYDOC, RECALL = "pydoc", "recall"
SUFFIXES = (".txt", ".jsonl", ".parquet")
VALIDATION_SHARE = 0.1
SHUFFLE_BUFFER = 256  # documents held in memory to shuffle a stream
PIECE_CHARS = 100_000  # a longer document is tokenized in pieces, so that only what is needed is tokenized
BATCH_CHARS = 200_000
_UNDOCUMENTED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "turtledemo"}

Tokens = np.ndarray  # Int32[n]
Rows = tuple[np.ndarray, np.ndarray]  # training and validation: Int32[rows, max_seq_len] each
Sides = dict[bool, list[Tokens]]  # held out? → the tokens of its documents, each closed by EOS


def parse_sources(data: str | dict[str, float]) -> dict[str, float]:
    """Turn the value of ``--data`` into weights that sum to 1.

    Parameters
    ----------
    data
        One source ("pydoc", "recall", a path, a Hub id), or several with their weights.

    Raises
    ------
    UserError
        No source, an empty name, or a weight that is not a finite number above 0.
    """
    sources: dict[Any, Any] = {data: 1.0} if isinstance(data, str) else data
    if not isinstance(sources, dict) or not sources:
        raise UserError(f"--data {data!r}: give a source, or sources with weights such as {{pydoc: 0.5, recall: 0.5}}")
    for name, weight in sources.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"--data {data!r}: a source needs a name: pydoc, recall, a path or a Hub dataset")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or weight <= 0:
            raise UserError(f"--data {name}: its weight is {weight!r}; weights are numbers above 0")
    total = math.fsum(sources.values())
    return {name: weight / total for name, weight in sources.items()}


def is_held_out(text: str, share: float = VALIDATION_SHARE) -> bool:
    """Whether a document belongs to validation: decided by its text alone, so that duplicates stay together."""
    digest = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _on_side(held_out: bool) -> Callable[[str], bool]:
    return lambda text: is_held_out(text) == held_out


def build_datasets(
    sources: str | dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    num_train_samples: int,
    num_validation_samples: int,
    seed: int,
    data_subset: str | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Build training and validation rows from other documents each.

    Parameters
    ----------
    sources
        Source name → weight (see `parse_sources`); rows are shared out by weight.
    max_seq_len
        Tokens in every row; there is no padding.
    num_train_samples, num_validation_samples
        Rows asked for. Training reuses documents in a new order where a source is too small; validation is never
        repeated, so it can hold fewer rows (logged).
    data_subset
        Configuration name of a Hub dataset.

    Returns
    -------
    train, validation
        Column ``input_ids``: ``max_seq_len`` ints a row, in an order fixed by ``seed``.
    fingerprint
        SHA-256 (hex) over all rows.

    Raises
    ------
    UserError
        A source that is unknown, unreadable, not UTF-8, empty, or too small for one row.
    """
    weights = parse_sources(sources)
    if tokenizer.eos_token_id is None:
        raise UserError("--model: its tokenizer has no end-of-sequence token, which separates documents in a row")
    counts = {
        False: dict(zip(weights, _share_out(num_train_samples, list(weights.values())), strict=True)),
        True: dict(zip(weights, _share_out(num_validation_samples, list(weights.values())), strict=True)),
    }
    loader = _Loader(tokenizer, max_seq_len, seed, data_subset)
    texts = sorted((name for name in weights if name != RECALL), key=lambda name: -weights[name])
    parts = [loader.text(name, counts[False][name], counts[True][name]) for name in texts]
    if RECALL in weights:
        parts.append(loader.recall(parts[:1], counts[False][RECALL], counts[True][RECALL]))
    train, validation = (
        np.random.default_rng(seed).permutation(np.concatenate([part[side] for part in parts])) for side in (0, 1)
    )
    fingerprint = hashlib.sha256(f"{train.shape} {validation.shape}".encode())
    fingerprint.update(train.astype("<i4").tobytes() + validation.astype("<i4").tobytes())
    return _dataset(train), _dataset(validation), fingerprint.hexdigest()


class _Loader:
    """What the sources of one call have in common."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, seed: int, data_subset: str | None):
        self.tokenizer, self.max_seq_len, self.seed, self.data_subset = tokenizer, max_seq_len, seed, data_subset

    def text(self, name: str, num_train: int, num_validation: int) -> Rows:
        """Rows of one text source: Int32[num_train, max_seq_len] and Int32[≤ num_validation, max_seq_len]."""
        need = {False: num_train * self.max_seq_len, True: num_validation * self.max_seq_len}
        sides = self._split(name, need)
        rng = np.random.default_rng(self.seed)
        held = sum(map(len, sides[False]))
        if held < need[False]:
            logger.warning(
                "--data %s holds %d tokens for training, %d are needed: documents are used %.1f times, reshuffled",
                *(name, held, need[False], need[False] / held),
            )
        train = _pack(_reshuffled(sides[False], rng), num_train, self.max_seq_len)
        validation = _pack(sides[True], num_validation, self.max_seq_len)
        if len(validation) < num_validation:
            logger.warning("--data %s: %d validation rows, not %d", name, len(validation), num_validation)
        return train, validation

    def recall(self, text: list[Rows], num_train: int, num_validation: int) -> Rows:
        """Recall rows between natural text, from the rows given or else pydoc; validation has its own facts."""
        rows = []
        for held_out, count in ((False, num_train), (True, num_validation)):
            if count and not (text and len(text[0][held_out])):
                text = [self.text(PYDOC, max(1, num_train // 2), max(1, num_validation // 2))]
            filler = text[0][held_out].reshape(-1) if count else np.empty(0, np.int32)
            drawn = recall_rows(
                self.tokenizer,
                filler[filler != self.tokenizer.eos_token_id].tolist(),  # it would end a chat turn
                self.max_seq_len,
                count,
                f"{self.seed}-{held_out}",
                accept=_on_side(held_out),
            )
            rows.append(np.array(list(drawn), dtype=np.int32).reshape(count, self.max_seq_len))
        return rows[0], rows[1]

    def _split(self, name: str, need: dict[bool, int]) -> Sides:
        """Tokens for training and validation, at least one row where any is needed.

        A source of very few documents (one file, say) can leave a side empty: then passages take the place of
        documents, in growing shares.
        """
        enough = {side: min(need[side], self.max_seq_len) for side in need}
        for as_passages, share in ((False, VALIDATION_SHARE), (True, VALIDATION_SHARE), (True, 0.3), (True, 0.5)):
            documents: Iterable[str] = _documents(name, self.seed, self.data_subset)
            if as_passages:
                documents = _passages(documents, 2 * self.max_seq_len)
            sides = self._tokenize(documents, need, share)
            if all(sum(map(len, sides[side])) >= enough[side] for side in enough):
                if as_passages:
                    logger.warning(
                        "--data %s has too few documents: training and validation are passages of the same ones", name
                    )
                return sides
        total = sum(len(tokens) for side in sides.values() for tokens in side)
        rows = "one row" if total < self.max_seq_len else "a training and a validation row"
        raise UserError(
            f"--data {name} holds {total} tokens, fewer than {rows} of --max_seq_len {self.max_seq_len}: "
            "give more text or shorter rows"
        )

    def _tokenize(self, documents: Iterable[str], need: dict[bool, int], share: float) -> Sides:
        """Tokenize documents until both sides have what they need; later documents are not even read."""
        sides: Sides = {False: [], True: []}
        have = {False: 0, True: 0}

        def flush() -> None:
            encoded = self.tokenizer([text for _, text, _ in batch], add_special_tokens=False, verbose=False)
            for (side, _, ends), ids in zip(batch, encoded["input_ids"], strict=True):
                sides[side].append(np.array([*ids, self.tokenizer.eos_token_id] if ends else ids, dtype=np.int32))
                have[side] += len(sides[side][-1])
            batch.clear()

        batch: list[tuple[bool, str, bool]] = []
        batch_chars = min(BATCH_CHARS, 8 * sum(need.values()))  # a small need reads little of a stream
        for side, text, ends in _pieces(documents, share):
            if have[side] < need[side]:
                batch.append((side, text, ends))
            if sum(len(text) for _, text, _ in batch) > batch_chars:
                flush()
            if all(have[side] >= need[side] for side in need):
                return sides
        if batch:
            flush()
        return sides


def _share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, by the largest remainder."""
    exact = [total * weight for weight in weights]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _pieces(documents: Iterable[str], share: float) -> Iterator[tuple[bool, str, bool]]:
    """(held out?, piece, is it the document's last?); cut before whitespace, where tokens begin anyway."""
    for document in documents:
        side, start = is_held_out(document, share), 0
        while len(document) - start > PIECE_CHARS:
            space = re.compile(r"\s").search(document, start + PIECE_CHARS)
            if space is None:
                break
            yield side, document[start : space.start()], False
            start = space.start()
        yield side, document[start:], True


def _passages(documents: Iterable[str], size: int) -> Iterator[str]:
    """Documents cut at white space into passages of at least `size` characters."""
    for document in documents:
        yield from re.findall(rf".{{{size},}}?(?=\s)|.+\Z", document, flags=re.DOTALL)


def _reshuffled(documents: list[Tokens], rng: np.random.Generator) -> Iterator[Tokens]:
    """The documents in order, then again and again in new orders."""
    yield from documents
    while True:
        for i in rng.permutation(len(documents)):
            yield documents[i]


def _pack(documents: Iterable[Tokens], num_rows: int, max_seq_len: int) -> np.ndarray:
    """Int32[≤ num_rows, max_seq_len]: the documents' tokens end to end, the last incomplete row dropped."""
    parts: list[Tokens] = []
    have = 0
    for tokens in documents if num_rows else ():
        parts.append(tokens)
        have += len(tokens)
        if have >= num_rows * max_seq_len:
            break
    full = min(have // max_seq_len, num_rows)
    flat = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return flat[: full * max_seq_len].reshape(full, max_seq_len)


def _dataset(rows: np.ndarray) -> datasets.Dataset:
    values = pa.array(np.ascontiguousarray(rows).reshape(-1), type=pa.int32())
    column = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    return datasets.Dataset(pa.table({"input_ids": column}))


# Sources: each is a stream of records with the column "text"


def _documents(name: str, seed: int, data_subset: str | None) -> Iterator[str]:
    """The documents of a source, in an order fixed by `seed`; nothing is read before it is asked for."""
    path = Path(name).expanduser()
    if name == PYDOC:
        parts = [*_topics(), *_library_files()]
        random.Random(seed).shuffle(parts)
        stream = datasets.IterableDataset.from_generator(_read_pydoc, gen_kwargs={"parts": parts})
    elif path.exists():
        stream = datasets.IterableDataset.from_generator(_read_files, gen_kwargs={"files": _text_files(path)})
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    else:
        stream = _hub_stream(name, data_subset).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return (record["text"] for record in stream if record["text"] and record["text"].strip())


def _text_files(path: Path) -> list[str]:
    """The text files at `path`, sorted; raises UserError for an empty file, a wrong kind, or none at all."""
    if path.is_file() and path.suffix not in SUFFIXES:
        raise UserError(f"--data {path}: its kind is not known; give a {', '.join(SUFFIXES)} file or a folder of them")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"--data {path}: the folder holds no {', '.join(SUFFIXES)} file")
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
            except json.JSONDecodeError as error:
                raise UserError(f"--data {file}, line {number}: it is not JSON ({error.msg})") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f'--data {file}, line {number}: it has no "text" field that holds a string')
            yield record["text"]


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
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or name.endswith(SUFFIXES):
        raise UserError(f"--data {name}: no such file or folder; give pydoc, recall, a path or a Hub dataset")
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=10)  # one quick request: load_dataset alone retries for 20 s and more
        stream = datasets.load_dataset(name, data_subset, split="train", streaming=True)
        columns = stream.column_names or list(next(iter(stream)))
    except Exception as error:  # the Hub's client raises a dozen unrelated kinds
        subset = f" --data_subset {data_subset}" if data_subset else ""
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--data {name}{subset}: neither pydoc, recall, a path, nor a Hub dataset that can be reached ({why})"
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
    root = sysconfig.get_path("stdlib")
    for part in parts:
        if part.endswith(".py"):
            module = ".".join(Path(part).relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            yield {"text": _docstrings(Path(part), module)}
        else:
            yield {"text": importlib.import_module("pydoc_data.topics").topics[part]}


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
