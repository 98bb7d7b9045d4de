"""From text to rows of tokens: read sources, split by document, tokenize, pack, mix."""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError, require
from sparsekv.progress import CountProgress
from sparsekv.recall import recall_rows
from sparsekv.sources import PYDOC, documents, is_path

logger = logging.getLogger(__name__)

RECALL = "recall"
VALIDATION_SHARE = 0.1
PIECE_CHARS = 100_000  # a longer document is tokenized in pieces, so that only what is needed is tokenized
BATCH_CHARS = 200_000

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
        No source, an empty name, a list, or a weight that is not a finite number above 0.
    """
    if isinstance(data, list) or (isinstance(data, str) and data.startswith("[") and not is_path(data)):
        raise UserError(f"--data {data}: a mixture is a mapping, such as {{pydoc: 0.5, recall: 0.5}}")
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


def check_subset(sources: Iterable[str], data_subset: str | None) -> None:
    """Raise UserError for a `data_subset` that none of the sources can have: only Hub datasets have any."""
    on_hub = [name for name in sources if name not in (PYDOC, RECALL) and not is_path(name)]
    require(
        not data_subset or bool(on_hub),
        f"--data_subset {data_subset}: is of a Hub dataset, and --data {', '.join(sources)} is none; leave it out, "
        "or give null where a file names one",
    )


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
        A source that is unknown, unreadable, not UTF-8, empty, or too small for one row; a subset of no Hub dataset.
    """
    weights = parse_sources(sources)
    check_subset(weights, data_subset)
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
            rows.append(np.array(list(_counted(drawn, count)), dtype=np.int32).reshape(count, self.max_seq_len))
        return rows[0], rows[1]

    def _split(self, name: str, need: dict[bool, int]) -> Sides:
        """Tokens for training and validation, at least one row where any is needed.

        A source of very few documents (one file, say) can leave a side empty: then passages take the place of
        documents, in growing shares.
        """
        enough = {side: min(need[side], self.max_seq_len) for side in need}
        for as_passages, share in ((False, VALIDATION_SHARE), (True, VALIDATION_SHARE), (True, 0.3), (True, 0.5)):
            texts: Iterable[str] = documents(name, self.seed, self.data_subset)
            if as_passages:
                texts = _passages(texts, 2 * self.max_seq_len)
            with CountProgress(f"tokens of {name}", sum(need.values())) as progress:
                sides = self._tokenize(texts, need, share, progress)
            if all(sum(map(len, sides[side])) >= enough[side] for side in enough):
                if as_passages:
                    logger.warning(
                        "--data %s has too few documents: training and validation are passages of the same ones", name
                    )
                return sides
        total = sum(len(tokens) for side in sides.values() for tokens in side)
        rows = "one row" if total < self.max_seq_len else "a training and a validation row"
        raise UserError(
            f"--data {name} holds {total} tokens, which do not make {rows} of --max_seq_len {self.max_seq_len}: "
            "give more text, text that repeats itself less, or shorter rows"
        )

    def _tokenize(
        self, documents: Iterable[str], need: dict[bool, int], share: float, progress: CountProgress
    ) -> Sides:
        """Tokenize documents until both sides have what they need; later documents are not even read."""
        sides: Sides = {False: [], True: []}
        have = {False: 0, True: 0}

        def flush() -> None:
            encoded = self.tokenizer([text for _, text, _ in batch], add_special_tokens=False, verbose=False)
            for (side, _, ends), ids in zip(batch, encoded["input_ids"], strict=True):
                sides[side].append(np.array([*ids, self.tokenizer.eos_token_id] if ends else ids, dtype=np.int32))
                progress.advance(min(len(sides[side][-1]), max(need[side] - have[side], 0)))
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


def _counted(rows: Iterator[list[int]], total: int) -> Iterator[list[int]]:
    """The recall rows as they are drawn: some ten thousand long ones take minutes."""
    with CountProgress("recall rows", total) as progress:
        for row in rows:
            yield row
            progress.advance(1)


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
