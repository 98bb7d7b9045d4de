"""ROUGE (Lin 2004) by the package `rouge`, and the needle's score made of it."""

from collections.abc import Sequence

from sparsekv.evaluation.benchmarks.schema import Row
from sparsekv.evaluation.benchmarks.scoring.packages import package

Rouge = dict[str, dict[str, float]]  # rouge-1, rouge-2, rouge-l → r, p, f


def rouge(hypothesis: str, reference: str) -> Rouge:
    """Recall, precision and F1 of words, pairs of words and longest common subsequence, 0 to 1.

    All are 0 for a text without words, and for sentences of about a thousand words, at which the package exceeds
    Python's recursion limit.
    """
    try:
        return package("rouge").Rouge().get_scores(hypothesis, reference)[0]
    except (ValueError, RecursionError):
        return {name: dict.fromkeys("rpf", 0.0) for name in ("rouge-1", "rouge-2", "rouge-l")}


def rouge_l(hypothesis: str, reference: str) -> float:
    """F1 of ROUGE-L, 0 to 1."""
    return rouge(hypothesis, reference)["rouge-l"]["f"]


def score(row: Row) -> dict[str, float]:
    """F1 of ROUGE between needle and prediction, in percent."""
    value = _needle(row)
    return {name: 100 * value[name]["f"] for name in ("rouge-l", "rouge-1", "rouge-2")}


def metrics(rows: Sequence[Row]) -> list[Rouge]:
    """ROUGE of every row; the needle takes the hypothesis' place, as kvpress has it, so r and p are exchanged."""
    return [_needle(row) for row in rows]


def _needle(row: Row) -> Rouge:
    return rouge(row["answer"].strip(), row["predicted_answer"].strip())
