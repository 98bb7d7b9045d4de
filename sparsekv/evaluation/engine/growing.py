"""Answers that grow by a token a step, each until its end."""

from collections.abc import Sequence
from typing import Any


class GrowingAnswers:
    """The new tokens of every row.

    As in kvpress's pipeline, a stop token ends a row from its second token on, and is part of the answer.

    Parameters
    ----------
    limits : sequence of int
        Most tokens of each row, at least 1.
    stop_ids : sequence of int
    """

    def __init__(self, limits: Sequence[int], stop_ids: Sequence[Any]) -> None:
        self.limits, self.stop_ids = limits, stop_ids
        self.tokens: list[list[int]] = [[] for _ in limits]

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Give each of these rows its next token; those that have ended stay as they are."""
        for row, token in zip(rows, tokens, strict=True):
            if self.grows(row):
                self.tokens[row].append(token)

    def grows(self, row: int) -> bool:
        """Whether a row has not ended."""
        tokens = self.tokens[row]
        return len(tokens) < self.limits[row] and (len(tokens) < 2 or tokens[-1] not in self.stop_ids)
