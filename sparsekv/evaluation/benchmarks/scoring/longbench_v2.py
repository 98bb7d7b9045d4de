"""LongBench v2 (Bai et al. 2024): one choice of four, said in the words that the question asks for."""

from collections.abc import Sequence

from sparsekv.evaluation.benchmarks.schema import Row


def score(row: Row) -> dict[str, float]:
    """``accuracy`` in percent."""
    return {"accuracy": 100.0 * _is_right(row)}


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Share of right answers, 0 to 1: of all rows (``average``), of each difficulty, and of each length."""
    groups = [("average", rows)]
    for column in ("difficulty", "length"):
        for value in sorted({row[column] for row in rows}):
            groups.append((value, [row for row in rows if row[column] == value]))
    return {name: sum(map(_is_right, group)) / len(group) for name, group in groups}


def _is_right(row: Row) -> bool:
    said, letter = row["predicted_answer"].replace("*", ""), row["answer"]
    return any(f"The correct answer is {form}" in said for form in (f"({letter})", letter))
