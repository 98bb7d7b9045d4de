"""Recall rows: facts early, questions about them late, natural text between.

A model trained for eviction must carry what it will be asked for through the cut. These rows give it such things to
carry, in many wordings and of many kinds: in half of the rows a few facts in a long background, where each must be
noticed, in the other half many, where there is much to hold. No wording is shared with an evaluation task (a test says
so).
"""

import random
from collections.abc import Callable, Iterator

from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError
from sparsekv.recall_few import FewFacts
from sparsekv.recall_many import ManyFacts
from sparsekv.recall_parts import RecallRow

FEW_SHARE = 0.5


def recall_rows(
    tokenizer: PreTrainedTokenizerBase,
    filler: list[int],
    max_seq_len: int,
    num_rows: int,
    seed: int | str,
    accept: Callable[[str], bool] = lambda text: True,
) -> Iterator[list[int]]:
    """Yield `num_rows` rows of exactly `max_seq_len` token ids.

    Parameters
    ----------
    tokenizer
        With a chat template, half of the rows are conversations in it.
    filler
        Token ids of natural text, drawn from at random places.
    seed
        Row i depends on the seed and i alone.
    accept
        Which entities and values may be used: keeps training and validation apart.

    Raises
    ------
    UserError
        `max_seq_len` is too short for a fact and a question.
    """
    for index in range(num_rows):
        yield draw_row(tokenizer, filler, max_seq_len, random.Random(f"{seed}-{index}"), accept).input_ids


def draw_row(
    tokenizer: PreTrainedTokenizerBase,
    filler: list[int],
    max_seq_len: int,
    rng: random.Random,
    accept: Callable[[str], bool] = lambda text: True,
) -> RecallRow:
    """Draw one row; see `recall_rows`. The front (facts in filler) takes whatever length the turns leave."""
    for _ in range(50):
        layout = FewFacts if rng.random() < FEW_SHARE else ManyFacts
        row = layout(tokenizer, filler, rng, accept).compose(max_seq_len)
        if row is not None:
            return row
    raise UserError(f"--max_seq_len {max_seq_len}: too short for recall rows; use longer rows or leave recall out")
