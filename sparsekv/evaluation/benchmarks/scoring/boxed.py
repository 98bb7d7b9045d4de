r"""Answers that a model puts into ``\boxed{}``: AIME 2025 and MATH-500."""

from collections.abc import Sequence

from sparsekv.evaluation.benchmarks.schema import Row

_BOX = "boxed{"


def score(row: Row, last: bool) -> dict[str, float]:
    """``accuracy`` in percent: 100 where the box holds exactly the answer.

    Parameters
    ----------
    row : Row
    last : bool
        Which box counts: the last one (AIME; without any box the whole text counts) or the first one (MATH-500).
    """
    return {"accuracy": 100.0 * _is_right(row, last)}


def metrics(rows: Sequence[Row], last: bool) -> dict[str, float]:
    """Counts of right and of boxed answers, and accuracy, 0 to 1."""
    correct = sum(_is_right(row, last) for row in rows)
    answered = sum(_BOX in row["predicted_answer"] for row in rows)
    return {"correct": correct, "answered": answered, "accuracy": correct / len(rows), "total": len(rows)}


def _is_right(row: Row, last: bool) -> bool:
    parts = row["predicted_answer"].split(_BOX)
    if not last and len(parts) == 1:
        return False
    return parts[-1 if last else 1].split("}")[0] == str(row["answer"])
