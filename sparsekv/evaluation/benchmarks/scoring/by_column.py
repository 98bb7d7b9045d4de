"""Scores of a user's own rows: RULER's, or the one that the column ``metric`` names."""

from collections.abc import Callable, Sequence
from functools import partial

from sparsekv.evaluation.benchmarks.schema import Row
from sparsekv.evaluation.benchmarks.scoring import string_match
from sparsekv.evaluation.benchmarks.scoring.rouge import rouge_l
from sparsekv.evaluation.benchmarks.scoring.rows import answers, by_task
from sparsekv.evaluation.benchmarks.scoring.text import f1, words

DEFAULT = "string_match"


def _exact(prediction: str, answer: str) -> float:
    return float(words(prediction) == words(answer))


def _f1(prediction: str, answer: str) -> float:
    return f1(words(prediction), words(answer))


def _best(measure: Callable[[str, str], float]) -> Callable[[Row], float]:
    """The measure against the accepted answer that fits best."""
    return lambda row: max(measure(row["predicted_answer"], answer) for answer in answers(row))


def _string_match(match: Callable[[str, Sequence[str]], float], row: Row) -> float:
    """As RULER has it, but for answers written with line breaks or spaces around them, which could never match."""
    return match(row["predicted_answer"], [string_match.clean(answer) for answer in answers(row)])


METRICS: dict[str, Callable[[Row], float]] = {
    DEFAULT: lambda row: _string_match(string_match.rule(row["task"]), row),
    "string_match_all": partial(_string_match, string_match.match_all),
    "string_match_part": partial(_string_match, string_match.match_part),
    "exact_match": _best(_exact),
    "f1": _best(_f1),
    "rouge-l": _best(rouge_l),
}


def score(row: Row) -> dict[str, float]:
    """The row's metric in percent.

    ``string_match`` (the default) goes by RULER's rule: all answers of the list must be in the prediction, any of
    them where the task is ``qa`` or ``qa_…``. ``string_match_all`` and ``string_match_part`` say which of the two.
    ``exact_match`` and ``f1`` compare words without case, punctuation and articles, ``rouge-l`` is F1.
    """
    name = row.get("metric", DEFAULT)
    return {name: 100 * METRICS[name](row)}


def metrics(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Task → metric → mean in percent, to two decimals, in the form of kvpress's RULER."""
    result: dict[str, dict[str, float]] = {}
    for task, group in by_task(rows).items():
        values: dict[str, list[float]] = {}
        for row in group:
            for name, value in score(row).items():
                values.setdefault(name, []).append(value)
        result[task] = {name: round(sum(found) / len(found), 2) for name, found in values.items()}
    return result
