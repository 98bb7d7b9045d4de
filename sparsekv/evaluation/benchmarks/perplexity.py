"""Perplexity as a benchmark: text to read, and the text that follows it, scored by its probability."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparsekv.data import is_held_out
from sparsekv.errors import UserError, require
from sparsekv.evaluation.benchmarks.schema import Row
from sparsekv.evaluation.benchmarks.scoring.rows import by_task
from sparsekv.sources import PYDOC, documents

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 128  # that follow the context and are scored
NUM_SAMPLES = 32
LOWER_IS_BETTER = frozenset({"nll", "kl"})
_EMPTY = {"question": "", "answer_prefix": "", "max_new_tokens": 0, "task": "text"}


def perplexity_rows(
    tokenizer: PreTrainedTokenizerBase, context_length: int, num_samples: int, source: str, seed: int
) -> list[dict[str, Any]]:
    """Consecutive passages of a text, each cut in two: the context, and the answer that follows it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    context_length : int
        Tokens of a context; `ANSWER_TOKENS` more are its answer.
    num_samples : int
        Passages at most (logged where the source holds fewer); a smaller number takes the first of them.
    source : str
        ``pydoc`` (documents that training holds out), or a .txt, .jsonl or .parquet file or a folder of them (read
        whole).
    seed : int
        Order of the documents.

    Raises
    ------
    UserError
        A source that cannot be read or holds not even one passage.
    """
    if source != PYDOC and not Path(source).expanduser().exists():
        raise UserError(
            f"--data_dir {source}: no such file or folder; perplexity takes text files, or pydoc by default"
        )
    require(tokenizer.is_fast, "--benchmark perplexity: needs a fast tokenizer, one that tells where its tokens end")
    try:
        texts = (text for text in documents(source, seed, None) if source != PYDOC or is_held_out(text))
        passages = list(itertools.islice(_passages(texts, tokenizer, context_length), num_samples))
    except UserError as error:
        raise UserError(f"--data_dir{str(error).removeprefix('--data')}") from error
    size = f"passages of {context_length} + {ANSWER_TOKENS} tokens"
    require(bool(passages), f"--data_dir {source}: it is too short for {size}; give more text, or shorter contexts")
    if len(passages) < num_samples:
        logger.warning("perplexity: %s holds %d %s, not %d", source, len(passages), size, num_samples)
    return [{**_EMPTY, "context": context, "answer": answer} for context, answer in passages]


def score(row: Row) -> dict[str, float]:
    """``nll`` and ``kl`` of a row, in nats a token."""
    return {"nll": row["nll"], "kl": row["kl"]}


def metrics(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Task → mean ``nll`` and ``kl`` (nats a token), and ``perplexity``, the exponential of that nll."""
    result = {}
    for task, group in by_task(rows).items():
        nll, kl = (fmean(row[name] for row in group) for name in ("nll", "kl"))
        result[task] = {"nll": nll, "kl": kl, "perplexity": float(np.exp(nll))}
    return result


def _passages(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, context_length: int
) -> Iterator[tuple[str, str]]:
    """The documents joined by blank lines, cut after every `context_length` and the next `ANSWER_TOKENS` tokens."""
    end = context_length + ANSWER_TOKENS
    rest, window = "", 8 * end  # characters tokenized at a time; a token has four or so
    for text in itertools.chain(texts, [None]):
        rest = "\n\n".join(part for part in (rest, text) if part)
        while text is None or len(rest) >= window:
            encoded = tokenizer(rest[:window], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = [stop for _, stop in encoded["offset_mapping"]]
            if len(ends) > end:
                middle, stop = ends[context_length - 1], ends[end - 1]
                yield rest[:middle], rest[middle:stop]
                rest = rest[stop:]
            elif len(rest) > window:
                window *= 2
            else:
                break
