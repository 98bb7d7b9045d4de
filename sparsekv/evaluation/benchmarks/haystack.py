"""Needle in a haystack: one sentence hidden at several depths of an essay (Kamradt 2023), built as kvpress does."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError, require
from sparsekv.evaluation.benchmarks.schema import COLUMNS

DEPTHS = tuple(range(0, 101, 10))  # percent of the essay before the needle
_BOOK = "This is a very long story book: <book> {} </book>."
_ROOM = 150  # tokens kept free for the question and the chat template


def parse_depths(data_dir: str | None) -> tuple[int, ...]:
    """Depths in percent from ``--data_dir``, such as ``50`` or ``0,50,100``; all of `DEPTHS` without it."""
    if data_dir is None:
        return DEPTHS
    try:
        depths = tuple(int(part) for part in data_dir.split(","))
    except ValueError:
        depths = ()
    require(
        bool(depths) and all(0 <= depth <= 100 for depth in depths),
        f"--data_dir {data_dir}: for needle_in_haystack give depths in percent, such as 50 or 0,50,100",
    )
    return depths


def haystack_rows(
    essay: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, context_length: int, depths: Sequence[int]
) -> list[dict[str, Any]]:
    """One row for each depth, with the needle between two tokens of the essay.

    Parameters
    ----------
    essay : Mapping
        A row whose ``answer`` is the needle.
    tokenizer : PreTrainedTokenizerBase
    context_length : int
        Tokens of the whole prompt at most; the essay is cut to what the needle and 150 tokens for the rest leave.
    depths : sequence of int
        Percent of the essay's tokens before the needle.

    Raises
    ------
    UserError
        The needle does not fit.
    """
    needle = tokenizer.encode(essay["answer"], add_special_tokens=False)
    room = context_length - len(needle) - _ROOM
    if room <= 0:
        shortest = len(needle) + _ROOM + 1
        raise UserError(f"--context_length {context_length}: needle_in_haystack needs {shortest} tokens or more")
    text = tokenizer.encode(essay["context"], add_special_tokens=False, verbose=False)[:room]
    rows = []
    for depth in depths:
        place = int(len(text) * depth / 100)
        context = tokenizer.decode([*text[:place], *needle, *text[place:]], skip_special_tokens=True)
        columns = {column: essay[column] for column in COLUMNS}
        rows.append({**columns, "context": _BOOK.format(context), "needle_depth": depth})
    return rows
