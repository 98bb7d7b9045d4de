"""LooGLE (Li et al. 2023): overlap of words with the reference, and masked entities to be named."""

import ast
import functools
import logging
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from sparsekv.errors import gist
from sparsekv.evaluation.benchmarks.schema import Row
from sparsekv.evaluation.benchmarks.scoring.packages import package
from sparsekv.evaluation.benchmarks.scoring.rouge import rouge
from sparsekv.evaluation.benchmarks.scoring.rows import by_task

logger = logging.getLogger(__name__)

_CLOZE = "shortdep_cloze"


def score(row: Row) -> dict[str, float]:
    """Measures of one row in percent: ROUGE recall, BLEU and METEOR, or for a cloze the shares of masks named."""
    if row["task"] == _CLOZE:
        matches = {"exact_match": _exact(row), "partial_match": _partial(row)}
        return {name: 100 * found / max(count, 1) for name, (found, count) in matches.items()}
    return {name: 100 * value for name, value in _overlap(row).items()}


def metrics(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Task → measure → value, 0 to 1.

    METEOR needs nltk's WordNet files, the BERTScore (means over all rows, never of one) needs `bert_score` and its
    model: where these are not there, the measure is left out, and the log says so.
    """
    result = {}
    for task, group in by_task(rows).items():
        if task == _CLOZE:
            result[task] = {"exact_match": _ratio(map(_exact, group)), "partial_match": _ratio(map(_partial, group))}
            continue
        values = [_overlap(row) for row in group]
        result[task] = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        result[task] |= _bert(group)
    return result


def _overlap(row: Row) -> dict[str, float]:
    """ROUGE recall, BLEU of words and of runs of four words, and METEOR, 0 to 1."""
    answer, said = row["answer"], row["predicted_answer"]
    by_rouge = rouge(said, answer)
    values = {name: by_rouge[name]["r"] for name in ("rouge-l", "rouge-1", "rouge-2")}
    reference, hypothesis = answer.split(), said.split()
    bleu = package("nltk.translate.bleu_score").sentence_bleu
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no run of four words matches, row after row
        values["bleu1"] = float(bleu([reference], hypothesis, weights=(1, 0, 0, 0)))
        values["bleu4"] = float(bleu([reference], hypothesis, weights=(0, 0, 0, 1)))
    if _has_wordnet():
        values["meteor"] = _meteor(reference, hypothesis)
    return values


def _meteor(reference: list[str], hypothesis: list[str]) -> float:
    """METEOR of the different words of both texts, in the order of the text.

    kvpress puts them into sets, whose order, and with it the value, changes from one process to the next.
    """
    meteor = package("nltk.translate.meteor_score").single_meteor_score
    return float(meteor(list(dict.fromkeys(reference)), list(dict.fromkeys(hypothesis))))


@functools.cache
def _has_wordnet() -> bool:
    try:
        package("nltk.corpus").wordnet.ensure_loaded()
    except LookupError:
        logger.warning("loogle: no METEOR without WordNet; to get it: python -m nltk.downloader wordnet")
        return False
    return True


def _bert(rows: Sequence[Row]) -> dict[str, float]:
    """Mean recall of BERTScore (Zhang et al. 2020) by roberta-large, 0 where a text is empty; or nothing."""
    pairs = [(row["answer"], row["predicted_answer"]) for row in rows]
    pairs = [pair for pair in pairs if all(map(str.strip, pair))]  # bert_score 0.3.13 fails on "" in transformers 5
    try:
        recall = package("bert_score").score(*zip(*pairs, strict=True), lang="en")[1].sum().item() if pairs else 0.0
    except Exception as error:  # package, model or hub: each fails in its own way
        logger.warning("loogle: no BERTScore (%s)", gist(error))
        return {}
    return {"bert": recall / len(rows)}


def _ratio(counts: Iterable[tuple[int, int]]) -> float:
    found, of = map(sum, zip(*counts, strict=True))
    return round(found / of, 4) if of else 0.0


def _exact(row: Row) -> tuple[int, int]:
    """Masks named exactly, and how many there are; a prediction that is no dictionary counts as one mask."""
    answer, said = _dictionary(row["answer"]), _dictionary(row["predicted_answer"])
    if said is None or answer is None:
        return 0, 1
    return sum(said.get(mask) == name for mask, name in answer.items()), len(answer)


def _partial(row: Row) -> tuple[int, int]:
    """Masks of which a word is right, and how many there are; 0 in all where a name is no text."""
    answer, said = _dictionary(row["answer"]) or {}, _dictionary(row["predicted_answer"]) or {}
    both = [(answer[mask], said[mask]) for mask in answer if mask in said]
    if not all(isinstance(name, str | bytes) for pair in both for name in pair):
        return 0, len(answer)
    return sum(not set(name.split()).isdisjoint(guess.split()) for name, guess in both), len(answer)


def _dictionary(text: str) -> dict | None:
    """The dictionary that a text writes in Python's notation, or None; it is parsed, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
