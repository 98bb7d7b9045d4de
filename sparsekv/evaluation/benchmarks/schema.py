"""What a benchmark is: rows to answer, and how answers are scored."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens", "task")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """Rows in kvpress's schema with their scorer.

    Attributes
    ----------
    name : str
        A name of the registry, or the stem of the user's file.
    data_dir : str or None
        Which part: a context length, a task, …; it becomes a part of the name of a cell's folder.
    rows : list of dict
        `COLUMNS` and what the scorer needs besides; ``answer`` is a string or a list.
    score : callable
        One row with its ``predicted_answer`` → metric → value, in percent where it is a share. The first metric is
        the headline. Empty where answers are not public.
    metrics : callable
        Rows with their ``predicted_answer`` → what kvpress's ``calculate_metrics`` returns for them.
    kind : {"generate", "likelihood"}
        Whether the model writes an answer, or the answer given is scored by its probability.
    grows : bool
        Answers are so long that the cache grows while decoding: only decoding presses make sense.
    lower_is_better : frozenset of str
        Metrics of which less is better.
    """

    name: str
    data_dir: str | None
    rows: list[dict[str, Any]]
    score: Callable[[Row], dict[str, float]]
    metrics: Callable[[Sequence[Row]], Any]
    kind: Literal["generate", "likelihood"] = "generate"
    grows: bool = False
    lower_is_better: frozenset[str] = frozenset()

    @cached_property
    def contexts(self) -> list[int]:
        """The number of each row's context, the same for rows with the same text; what is blank is none to share."""
        numbers: dict[str | int, int] = {}
        texts = (row["context"] if row["context"].strip() else number for number, row in enumerate(self.rows))
        return [numbers.setdefault(text, len(numbers)) for text in texts]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the name, the part and every row: the same for the same questions in the same order."""
        digest = hashlib.sha256(json.dumps([self.name, self.data_dir]).encode())
        for row in self.rows:
            digest.update(b"\n" + json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()
