"""Answers looked for in the prediction, any case: RULER's scores (Hsieh et al. 2024)."""

import re
from collections.abc import Callable, Sequence

from sparsekv.evaluation.benchmarks.schema import Row
from sparsekv.evaluation.benchmarks.scoring.rows import answers, by_task

_CONTROL = re.compile(r"[\x00-\x1f]")


def match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction contains, 0 to 1."""
    found = _found(prediction, references)
    return sum(found) / len(found)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction contains any of the references, else 0."""
    return max(_found(prediction, references))


def rule(task: str) -> Callable[[str, Sequence[str]], float]:
    """RULER's rule: any answer will do for the tasks ``qa`` and ``qa_…``, all answers are wanted for the others."""
    return match_part if task.split("_")[0] == "qa" else match_all


def clean(text: str) -> str:
    """The text without control characters (line breaks too) and without white space around it."""
    return _CONTROL.sub("", text.strip()).strip()


def score(row: Row) -> dict[str, float]:
    """``string_match`` in percent, by `rule`."""
    return {"string_match": 100 * _value(row)}


def metrics(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Task → ``string_match`` → mean in percent, to two decimals."""
    return {
        task: {"string_match": round(sum(map(_value, group)) / len(group) * 100, 2)}
        for task, group in by_task(rows).items()
    }


def _value(row: Row) -> float:
    return rule(row["task"])(row["predicted_answer"], answers(row))


def _found(prediction: str, references: Sequence[str]) -> list[float]:
    text = clean(prediction).lower()
    return [float(reference.lower() in text) for reference in references]
