"""LongBench and LongBench-E (Bai et al. 2023): one measure for each task."""

import difflib
import re
from collections.abc import Callable, Sequence

from sparsekv.evaluation.benchmarks.schema import Row
from sparsekv.evaluation.benchmarks.scoring.packages import package
from sparsekv.evaluation.benchmarks.scoring.rouge import rouge_l
from sparsekv.evaluation.benchmarks.scoring.rows import answers, by_task
from sparsekv.evaluation.benchmarks.scoring.text import chinese_words, f1, words

_FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}  # tasks by examples: a model goes on and writes the next one
_COMMENT_MARKS = ("`", "#", "//")
_BUCKETS = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, float("inf"))}  # words of the context


def score(row: Row) -> dict[str, float]:
    """``score`` of a row of LongBench in percent."""
    return {"score": 100 * _best(row, row["predicted_answer"].lstrip())}


def metrics(rows: Sequence[Row]) -> float | dict[str, float]:
    """Mean in percent, to two decimals; by task where there are several (kvpress evaluates one at a time)."""
    means = {
        task: round(100 * sum(_best(row, row["predicted_answer"].lstrip()) for row in group) / len(group), 2)
        for task, group in by_task(rows).items()
    }
    return means if len(means) > 1 else next(iter(means.values()))


def score_e(row: Row) -> dict[str, float]:
    """``score`` of a row of LongBench-E in percent; unlike LongBench, white space before the first line is kept."""
    return {"score": 100 * _best(row, row["predicted_answer"])}


def metrics_e(rows: Sequence[Row]) -> dict:
    """Mean in percent for contexts below 4,000, below 8,000 and of more words; NaN for a class without rows."""
    tasks = {
        task: {name: _bucket(group, *span) for name, span in _BUCKETS.items()} for task, group in by_task(rows).items()
    }
    return tasks if len(tasks) > 1 else next(iter(tasks.values()))


def _bucket(rows: Sequence[Row], low: float, high: float) -> float:
    values = [_best(row, row["predicted_answer"]) for row in rows if low <= row["length"] < high]
    return round(100 * sum(values) / len(values), 2) if values else float("nan")


def _best(row: Row, prediction: str) -> float:
    """Measure of the task against the answer that fits best, 0 to 1."""
    task = row["task"].removesuffix("-e")
    if task in _FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if task in _CLASSIFICATION:
        return max((_classification(prediction, answer, row["all_classes"]) for answer in answers(row)), default=0.0)
    return max((MEASURES[task](prediction, answer) for answer in answers(row)), default=0.0)


def _qa_f1(prediction: str, answer: str) -> float:
    return f1(words(prediction), words(answer))


def _qa_f1_chinese(prediction: str, answer: str) -> float:
    return f1(chinese_words(prediction), chinese_words(answer))


def _rouge_chinese(prediction: str, answer: str) -> float:
    cut = package("jieba").lcut
    return rouge_l(" ".join(cut(prediction)), " ".join(cut(answer)))


def _classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the prediction names, where the answer is one of them.

    Names that are part of the answer's own name do not count. LongBench takes them out of the list while going
    through it, so that the name after one taken out stays in.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            del named[named.index(named[place])]
        place += 1
    return 1 / len(named) if answer in named else 0.0


def _count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def _paragraph(prediction: str, answer: str) -> float:
    number = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    return _count(prediction, number[1]) if number else 0.0


def _code_similarity(prediction: str, answer: str) -> float:
    """Similarity of the first line without comment to the answer, by `difflib`, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _COMMENT_MARKS)), "")
    if not line or not answer:
        return float(line == answer)
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


_CLASSIFICATION = {"trec", "lsht"}
MEASURES: dict[str, Callable[[str, str], float]] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), _qa_f1
    ),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    "passage_count": _count,
    "passage_retrieval_en": _paragraph,
    **dict.fromkeys(("lcc", "repobench-p"), _code_similarity),
    "multifieldqa_zh": _qa_f1_chinese,
    **dict.fromkeys(("dureader", "vcsum"), _rouge_chinese),
    "passage_retrieval_zh": _paragraph,
}
TASKS = (*MEASURES, *sorted(_CLASSIFICATION))
