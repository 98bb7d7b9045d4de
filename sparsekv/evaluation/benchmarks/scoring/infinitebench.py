"""InfiniteBench (Zhang et al. 2024): one measure for each task; all but its summaries, which kvpress does not score."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from sparsekv.evaluation.benchmarks.schema import Row
from sparsekv.evaluation.benchmarks.scoring.rows import answers, by_task
from sparsekv.evaluation.benchmarks.scoring.text import chinese_characters, f1, words

_NUMBER = re.compile(r"\d+\.\d+|\d+")


def score(row: Row) -> dict[str, float]:
    """``score`` in percent."""
    return {"score": 100 * _value(row)}


def metrics(rows: Sequence[Row]) -> float | dict[str, float]:
    """Mean, 0 to 1; by task where there are several (kvpress evaluates one at a time)."""
    means = {task: sum(map(_value, group)) / len(group) for task, group in by_task(rows).items()}
    return means if len(means) > 1 else next(iter(means.values()))


def _value(row: Row) -> float:
    return float(MEASURES[row["task"]](row["predicted_answer"], answers(row)))


def _spaced(text: str, marks: str) -> str:
    """The text with spaces in place of the marks."""
    return text.translate(dict.fromkeys(map(ord, marks), " "))


def _integer(text: str) -> int | None:
    """The number a text says; None where it is none, or one too long for Python to read."""
    try:
        return int(text)
    except ValueError:
        return None


def _kv_retrieval(prediction: str, labels: list[str]) -> bool:
    return labels[0] in _spaced(prediction, "\n:\"'.,?!{}").split()


def _first_digits(prediction: str, labels: list[str]) -> bool:
    digits = re.search("[0-9]+", prediction)
    return labels[0] == (digits[0] if digits else "")


def _code_run(prediction: str, labels: list[int]) -> bool:
    said = _spaced(prediction, "\n.`'\":").split()
    return bool(said) and labels[0] == _integer(said[-1])


def _math_find(prediction: str, labels: list[int] | list[float]) -> bool:
    number = _NUMBER.search(prediction)
    if number is None:
        return False
    return labels[0] == (_integer(number[0]) if isinstance(labels[0], int) else float(number[0]))


def _math_calc(prediction: str, labels: list[Any]) -> float:
    """Share of the intermediate values that are right before the first wrong one."""
    values = labels[0] if isinstance(labels[0], list) else labels
    right = 0
    for said, value in zip(re.findall("[0-9]+", prediction), values, strict=False):
        if _integer(said) != value:
            break
        right += 1
    return right / len(values)


def _dialogue(prediction: str, labels: list[str]) -> bool:
    return any(label.upper() in prediction.strip().upper() for label in labels)


def _book_qa(prediction: str, labels: list[str]) -> float:
    return max((f1(words(prediction), words(label)) for label in labels), default=0.0)


def _book_qa_chinese(prediction: str, labels: list[str]) -> float:
    said = chinese_characters(prediction)
    return max((f1(said, chinese_characters(label)) for label in labels), default=0.0)


def _last_letter(text: str, letters: str) -> str | None:
    """The last letter that stands alone, in the first line that has one."""
    found = re.search(rf"\b[{letters}]\b(?!.*\b[{letters}]\b)", text)
    return found[0] if found else None


def _after(text: str, openings: Sequence[str]) -> str | None:
    """What follows the first of the openings that the text has, and the one character after it."""
    for opening in openings:
        if opening in text:
            return text[text.index(opening) + len(opening) + 1 :]
    return None


def _code_debug(prediction: str, labels: list[str]) -> bool:
    """The letter of the option or the name of the function; kvpress's rows hold the letter alone."""
    text, forms = prediction.strip(), (labels[:2][-1], labels[0])
    if _last_letter(text, "A-J") == forms[0]:
        return True
    text = re.sub("Option|option", " ", _spaced(text, "\n`'\"-*"))
    text = re.sub(" {2,}", " ", text)
    if text.startswith(forms):
        return True
    rest = _after(text, ("answer is:", "is:", "answer:", "correct option is:"))
    return rest.startswith(forms) if rest else False


def _book_choice(prediction: str, labels: list[str]) -> bool:
    """The letter of the choice: alone, at the start, after an opening, or the first one named."""
    text = prediction.strip()
    if _last_letter(text, "A-D") in labels:
        return True
    if text[:1] in ("A", "B", "C", "D"):
        return text[0] in labels
    if not text or text in labels:
        return bool(text)
    text = re.sub(" {2,}", " ", _spaced(text, "\n\"'.,?!{}"))
    rest = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return rest.startswith(tuple(labels)) if rest else False
    return next((word in labels for word in text.split() if word in "ABCD"), False)


MEASURES: dict[str, Callable[[str, list], float]] = {
    "passkey": _first_digits,
    "kv_retrieval": _kv_retrieval,
    "number_string": _first_digits,
    "longdialogue_qa_eng": _dialogue,
    "longbook_qa_eng": _book_qa,
    "longbook_choice_eng": _book_choice,
    "code_run": _code_run,
    "code_debug": _code_debug,
    "math_find": _math_find,
    "math_calc": _math_calc,
    "longbook_qa_chn": _book_qa_chinese,
}
NUMBERS = {"code_run", "math_find", "math_calc"}  # tasks whose answers are compared as numbers
