"""Small readers of rows."""

from collections.abc import Sequence

from sparsekv.evaluation.benchmarks.schema import Row


def answers(row: Row) -> list:
    """The accepted answers of a row: a list, whether it has one or several."""
    return [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each task, tasks sorted by name."""
    groups: dict[str, list[Row]] = {task: [] for task in sorted({row["task"] for row in rows})}
    for row in rows:
        groups[row["task"]].append(row)
    return groups
