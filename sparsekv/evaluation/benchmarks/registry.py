"""Name → benchmark."""

import difflib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError, require
from sparsekv.evaluation.benchmarks import perplexity
from sparsekv.evaluation.benchmarks.files import SUFFIXES, file_rows
from sparsekv.evaluation.benchmarks.haystack import haystack_rows, parse_depths
from sparsekv.evaluation.benchmarks.hub import HUB, hub_rows
from sparsekv.evaluation.benchmarks.ruler import TASKS, ruler_rows
from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.benchmarks.scoring import by_column, string_match
from sparsekv.sources import PYDOC

CONTEXT_LENGTH = 4096  # where a benchmark of any length is asked for without one
OF_ANY_LENGTH = ("ruler-local", "perplexity", "needle_in_haystack")  # rows are made to it
LOCAL_SAMPLES = 20  # of each task of ruler-local


@dataclass(frozen=True)
class _Request:
    """What the user asked for."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    data_dir: str | None
    tasks: tuple[str, ...]
    num_samples: int | None
    seed: int

    def refuse(self, *flags: str) -> None:
        """Raise UserError for a flag that was given and that this benchmark cannot heed."""
        for flag in flags:
            value = getattr(self, flag)
            require(not value, f"--{flag} {value}: it has no meaning for --benchmark {self.name}")

    def choose(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The tasks asked for, `num_samples` rows of each in an order fixed by the seed alone.

        The rows of a smaller number are the first rows of a larger one.
        """
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["task"], []).append(row)
        _known(self.tasks, list(groups), "--tasks", f"{self.name} has the tasks")
        chosen = []
        for task in self.tasks or groups:
            random.Random(f"{self.seed}-{task}").shuffle(groups[task])
            chosen += groups[task][: self.num_samples]
        return chosen


def load_benchmark(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    data_dir: str | None = None,
    tasks: Sequence[str] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> Benchmark:
    """Load or make a benchmark.

    Parameters
    ----------
    name : str
        A key of `BENCHMARKS`, or the path of a .jsonl or .parquet file with the columns of the schema.
    tokenizer : PreTrainedTokenizerBase
        Measures context lengths.
    context_length : int, optional
        Tokens of a context, for ruler-local, perplexity and needle_in_haystack (4096 by default); for ruler another
        way to give `data_dir`.
    data_dir : str, optional
        Part of a benchmark: ruler's context length, one task of longbench, longbench-e, infinitebench or loogle,
        needle_in_haystack's depths in percent (``0,50,100``), perplexity's text file.
    tasks : sequence of str, optional
        Only these tasks; all of them by default.
    num_samples : int, optional
        Rows of each task, chosen by `seed`; a smaller number takes the first rows of a larger one. All by default
        (ruler-local 20, perplexity 32).
    seed : int

    Raises
    ------
    UserError
        An unknown name, part or task, an unreachable Hub, a file that cannot be used, or a package that the scorer
        needs and that is not installed: found now, not after hours of generation.
    """
    require(context_length is None or context_length > 0, f"--context_length {context_length}: give a number above 0")
    require(num_samples is None or num_samples > 0, f"--num_samples {num_samples}: give a number above 0")
    wanted = tuple(dict.fromkeys(tasks or ()))
    request = _Request(name, tokenizer, context_length, data_dir, wanted, num_samples, seed)
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name](request)
    elif name.endswith(SUFFIXES):
        benchmark = _file(request)
    else:
        kind = f"its kind is not known; give a {' or '.join(SUFFIXES)} file" if Path(name).exists() else None
        require(kind is None, f"--benchmark {name}: {kind}")
        _known([name], list(BENCHMARKS), "--benchmark", f"give a {' or '.join(SUFFIXES)} file or one of")
    if benchmark.kind == "generate":
        for row in {row["task"]: row for row in benchmark.rows}.values():
            benchmark.score({**row, "predicted_answer": ""})
    return benchmark


def _known(values: Sequence[str], known: Sequence[str], flag: str, hint: str) -> None:
    """Raise UserError for the first value that is not known, with the nearest names."""
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known)
            suggestion = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"{flag} {value}: it is not known; {suggestion}{hint} {', '.join(known)}")


def _hub(request: _Request) -> Benchmark:
    request.refuse("context_length")
    return _from_hub(request, request.data_dir, request.choose(hub_rows(request.name, request.data_dir)))


def _ruler(request: _Request) -> Benchmark:
    """The Hub's RULER: its parts are context lengths."""
    length = str(request.context_length or request.data_dir or CONTEXT_LENGTH)
    if request.data_dir not in (None, length):
        raise UserError(f"--data_dir {request.data_dir}: it is not the --context_length {length}; give one of them")
    there = HUB[request.name].folders
    require(length in there or not request.context_length, f"--context_length {length}: give one of {', '.join(there)}")
    return _from_hub(request, length, request.choose(hub_rows(request.name, length)))


def _needle(request: _Request) -> Benchmark:
    depths = parse_depths(request.data_dir)
    essay = hub_rows(request.name, None)[0]
    length = request.context_length or CONTEXT_LENGTH
    rows = haystack_rows(essay, request.tokenizer, length, depths)
    return _from_hub(request, _part(length, request.data_dir), request.choose(rows))


def _from_hub(request: _Request, data_dir: str | None, rows: list[dict[str, Any]]) -> Benchmark:
    dataset = HUB[request.name]
    return Benchmark(request.name, data_dir, rows, dataset.score, dataset.metrics, grows=dataset.grows)


def _ruler_local(request: _Request) -> Benchmark:
    request.refuse("data_dir")
    length = request.context_length or CONTEXT_LENGTH
    rows = ruler_rows(
        request.tokenizer, length, request.num_samples or LOCAL_SAMPLES, request.seed, request.tasks or TASKS
    )
    return Benchmark(request.name, str(length), rows, string_match.score, string_match.metrics)


def _perplexity(request: _Request) -> Benchmark:
    request.refuse("tasks")
    length, source = request.context_length or CONTEXT_LENGTH, request.data_dir or PYDOC
    num_samples = request.num_samples or perplexity.NUM_SAMPLES
    rows = perplexity.perplexity_rows(request.tokenizer, length, num_samples, source, request.seed)
    return Benchmark(
        *(request.name, _part(length, request.data_dir), rows, perplexity.score, perplexity.metrics, "likelihood"),
        lower_is_better=perplexity.LOWER_IS_BETTER,
    )


def _part(length: int, data_dir: str | None) -> str:
    """Context length and what else was chosen, fit for the name of a folder."""
    return f"{length}-{Path(data_dir).stem}" if data_dir else str(length)


def _file(request: _Request) -> Benchmark:
    request.refuse("context_length", "data_dir")
    path = Path(request.name).expanduser()
    return Benchmark(path.stem, None, request.choose(file_rows(path)), by_column.score, by_column.metrics)


BENCHMARKS: dict[str, Callable[[_Request], Benchmark]] = {
    "ruler-local": _ruler_local,
    "perplexity": _perplexity,
    **dict.fromkeys(HUB, _hub),
    "ruler": _ruler,
    "needle_in_haystack": _needle,
}
