"""Benchmarks on the Hugging Face Hub: kvpress's processed copies, whose rows have its schema already."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants

from sparsekv.errors import UserError, gist, require
from sparsekv.evaluation.benchmarks.schema import COLUMNS, Row
from sparsekv.evaluation.benchmarks.scoring import (
    boxed,
    infinitebench,
    longbench,
    longbench_v2,
    loogle,
    rouge,
    string_match,
    zero_scrolls,
)

# The tasks that the repository holds; scores exist for LongBench's Chinese ones as well.
_LONGBENCH = (
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum"),
    *("multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
_LONGBENCH_E = tuple(f"{task}_e" for task in _LONGBENCH if task not in {"narrativeqa", "musique", "qmsum"})
_LOOGLE = ("shortdep_qa", "longdep_qa", "shortdep_cloze", "longdep_summarization")
_RULER = ("4096", "8192", "16384")


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub and how to read and score it.

    Attributes
    ----------
    repository : str
        ``owner/name`` on the Hub (or a local folder laid out like it); split ``test`` is read.
    score, metrics : callable
        The scorer (see `sparsekv.evaluation.benchmarks.schema.Benchmark`).
    folders : tuple of str
        Folders of the repository, one each for a task or a context length; empty where it has a single part.
    answer : str
        The column that becomes ``answer``.
    extra : tuple of str
        Columns that the scorer needs besides.
    grows : bool
        See `sparsekv.evaluation.benchmarks.schema.Benchmark`.
    """

    repository: str
    score: Callable[[Row], dict[str, float]]
    metrics: Callable[[Sequence[Row]], Any]
    folders: tuple[str, ...] = ()
    answer: str = "answer"
    extra: tuple[str, ...] = ()
    grows: bool = False


HUB = {
    "ruler": HubDataset("simonjegou/ruler", string_match.score, string_match.metrics, _RULER),
    "longbench": HubDataset(
        *("Xnhyacinth/LongBench", longbench.score, longbench.metrics, _LONGBENCH, "answers", ("all_classes",))
    ),
    "longbench-e": HubDataset(
        *("Xnhyacinth/LongBench", longbench.score_e, longbench.metrics_e, _LONGBENCH_E, "answers"),
        extra=("all_classes", "length"),
    ),
    "longbench-v2": HubDataset(
        *("simonjegou/LongBench-v2", longbench_v2.score, longbench_v2.metrics), extra=("difficulty", "length")
    ),
    "infinitebench": HubDataset(
        *("MaxJeblick/InfiniteBench", infinitebench.score, infinitebench.metrics, tuple(infinitebench.MEASURES))
    ),
    "loogle": HubDataset("simonjegou/loogle", loogle.score, loogle.metrics, _LOOGLE),
    "zero_scrolls": HubDataset("simonjegou/zero_scrolls", zero_scrolls.score, zero_scrolls.metrics),
    "needle_in_haystack": HubDataset("alessiodevoto/paul_graham_essays", rouge.score, rouge.metrics, answer="needle"),
    "aime25": HubDataset(
        *("alessiodevoto/aime25", partial(boxed.score, last=True), partial(boxed.metrics, last=True)), grows=True
    ),
    "math500": HubDataset(
        *("alessiodevoto/math500", partial(boxed.score, last=False), partial(boxed.metrics, last=False)), grows=True
    ),
}


def hub_rows(name: str, data_dir: str | None) -> list[dict[str, Any]]:
    """Rows of a benchmark of `HUB` in the Hub's order.

    Parameters
    ----------
    name : str
    data_dir : str, optional
        One folder of the repository (a task; for RULER a context length); without it, all of them.

    Raises
    ------
    UserError
        The Hub cannot be reached, or the dataset has no such folder or not the columns that kvpress reads.
    """
    dataset = HUB[name]
    known = dataset.folders + (longbench.TASKS if name == "longbench" else ())
    if data_dir is not None and data_dir not in known:
        parts = f"give one of {', '.join(dataset.folders)}" if dataset.folders else "it has no parts to choose from"
        raise UserError(f"--data_dir {data_dir}: {name} has no such part; {parts}")
    folders = [data_dir] if data_dir is not None else dataset.folders or [None]
    return [_row(name, record) for folder in folders for record in _records(name, folder)]


def _records(name: str, folder: str | None) -> Iterator[dict[str, Any]]:
    """The records of one folder; one quick question first, as load_dataset alone tries for minutes."""
    repository = HUB[name].repository
    try:
        if not constants.HF_HUB_OFFLINE and not Path(repository).is_dir():
            HfApi().dataset_info(repository, timeout=10)
        yield from datasets.load_dataset(repository, data_dir=folder, split="test")
    except Exception as error:  # the Hub's client raises a dozen unrelated kinds
        part = f"/{folder}" if folder else ""
        raise UserError(
            f"--benchmark {name}: {repository}{part} cannot be loaded from the Hub ({gist(error)}); "
            "ruler-local and perplexity need no Hub"
        ) from error


def _row(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    dataset = HUB[name]
    record = {"task": name, **record}
    columns = {column: dataset.answer if column == "answer" else column for column in (*COLUMNS, *dataset.extra)}
    missing = [column for column in columns.values() if column not in record]
    require(
        not missing,
        f"--benchmark {name}: {dataset.repository} has no column {', '.join(missing)}; it has {', '.join(record)}",
    )
    row = {column: record[source] for column, source in columns.items()}
    row["answer"] = _answer(row)
    return row


def _answer(row: Mapping[str, Any]) -> Any:
    """The answer as its scorer compares it: numbers that the Hub stores as text are numbers again."""
    answer = row["answer"]
    if not isinstance(answer, list):
        return str(answer)
    return [_number(text) for text in answer] if row["task"] in infinitebench.NUMBERS else answer


def _number(text: Any) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
