"""Every option of an evaluation: the schema of `configs/matrix.yaml` and of `sparsekv eval`."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from sparsekv.errors import UserError, require

FULL_CACHE = ("no_press", 0.0)


@dataclass
class RunConfig:
    """A model of the matrix, with or without an adapter.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    adapter
        Folder of an adapter trained on it, such as out/final.
    """

    model: str = ""
    adapter: str | None = None


@dataclass
class CellOptions:
    """What is asked of a model on one benchmark.

    Parameters
    ----------
    data_dir
        Part of the benchmark, such as 4096 of ruler; also NAME:DATA_DIR in --benchmark.
    context_length
        Tokens of a context, where the benchmark is made to measure (ruler-local, perplexity, needle_in_haystack).
    tasks
        Tasks of the benchmark, commas between them; default: all.
    presses
        Presses, commas between them, each NAME or NAME:PARAMETER=VALUE; no_press is always added.
    ratios
        Compression ratios in [0, 1), commas between them: the share of the cache that is evicted.
    num_samples
        Rows of each task; default: all there are.
    max_new_tokens
        Longest answer in tokens; default: what the benchmark says, row by row.
    max_context_length
        Cut contexts to this many tokens; by default one that is too long for the model is refused.
    chat_template
        Put contexts and questions into the model's chat template, where it has one.
    enable_thinking
        Handed to the chat template.
    query_aware
        Show the press the question, as the end of the context.
    temperature
        Of the draw of each token; 0: the most likely one.
    top_p
        Draw from the most likely tokens that together have this probability.
    top_k
        Draw from this many most likely tokens; 0: all.
    num_generations
        Answers to each question, scored on average (pass@1).
    """

    data_dir: str | int | None = None
    context_length: int | None = None
    tasks: list[str] | str | None = None
    presses: list[str] | str = "snapkv,streaming_llm,critical_snapkv,knorm"
    ratios: list[float] | float | str = "0.3,0.5,0.7"
    num_samples: int | None = None
    max_new_tokens: int | None = None
    max_context_length: int | None = None
    chat_template: bool = True
    enable_thinking: bool = False
    query_aware: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_generations: int = 1

    def __post_init__(self) -> None:
        for flag in ("context_length", "num_samples", "max_new_tokens", "max_context_length", "num_generations"):
            value = getattr(self, flag)
            require(value is None or value >= 1, f"--{flag} {value}: must be at least 1")
        require(0 <= self.temperature < math.inf, f"--temperature {self.temperature}: must be at least 0")
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0 and at most 1")
        require(self.top_k >= 0, f"--top_k {self.top_k}: must be at least 0")
        require(
            self.num_generations == 1 or self.temperature > 0,
            f"--num_generations {self.num_generations}: all would be the same at --temperature 0; give one above",
        )
        cut = self.max_context_length
        require(
            not (self.query_aware and cut),
            f"--max_context_length {cut}: would cut off the question that --query_aware puts at the end of the context",
        )
        require(bool(split(self.presses)), "--presses is empty: name one, or no_press for the full cache alone")
        require(bool(split(self.ratios)), "--ratios is empty: give the share of the cache to evict, such as 0.5")
        self.cells()  # checks the ratios

    def cells(self) -> list[tuple[str, float]]:
        """(press, ratio) of every cell, the full cache first."""
        ratios = [_ratio(text) for text in split(self.ratios)]
        presses = [name for name in split(self.presses) if name != FULL_CACHE[0]]
        return [FULL_CACHE, *dict.fromkeys((press, ratio) for press in presses for ratio in ratios)]


@dataclass
class Suite(CellOptions):
    """One benchmark of the matrix.

    Parameters
    ----------
    name
        Of a benchmark, or a .jsonl or .parquet file.
    """

    name: str = ""

    def __post_init__(self) -> None:
        require(bool(self.name), "its name is missing")
        super().__post_init__()


@dataclass
class EvalConfig(CellOptions):
    """An evaluation: models × benchmarks × presses × ratios; a second call does what is missing.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    adapter
        Folder of an adapter trained on it, such as out/final.
    runs
        Several models instead, best in a file: {name: {model, adapter}}; the cells of each go to OUT/NAME.
    only
        Names of the runs to do, commas between them; default: all.
    benchmark
        Benchmarks, commas between them: NAME, NAME:DATA_DIR, or a .jsonl or .parquet file; default: ruler-local.
    benchmarks
        Benchmarks with options of their own, best in a file: a list of {name, any option of a benchmark}.
    out
        Folder of the results.
    dtype
        Of the weights: auto, float32, bfloat16, float16.
    device
        cpu, cuda, cuda:N, or auto, which spreads the model over the local GPUs; default: a GPU if there is one.
    memory_budget_gib
        Memory for caches in GiB; default: from what is free.
    seed
        Of the rows that are drawn, presses that draw, and sampling.
    view_tokens
        Longest context that is kept for the report's token viewer; 0: none.
    shard
        i/n: do every n-th part of the work, from the i-th on, counting from 0; default: whatever no other process does.
    trust_remote_code
        Run the model's own code from the Hub.
    """

    model: str = ""
    adapter: str | None = None
    runs: dict[str, RunConfig] = field(default_factory=dict)
    only: list[str] | str | None = None
    benchmark: list[str] | str | None = None
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    out: str = ""
    dtype: str = "auto"
    device: str | None = None
    memory_budget_gib: float | None = None
    seed: int = 0
    view_tokens: int = 2048
    shard: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.out), "--out is missing: the folder of the results")
        require(bool(self.model) != bool(self.runs), "--model or runs: give one of them, and not both")
        require(not (self.runs and self.adapter), "--adapter: give each of the runs its own")
        for name, run in self.runs.items():
            require(bool(run.model), f"runs: {name} lacks its model")
            require(bool(re.fullmatch(r"\w[\w.+-]*", name)), f"runs: {name!r} cannot be the name of a folder")
        models = [(run.model, run.adapter) for run in self.runs.values()]
        require(len(set(models)) == len(models), "runs: two have the same model and adapter; leave one out")
        for name in split(self.only):
            require(name in self.runs, f"--only {name}: no such run; there are {', '.join(self.runs) or 'none'}")
        budget = self.memory_budget_gib
        require(budget is None or 0 < budget < math.inf, f"--memory_budget_gib {budget}: must be above 0")
        require(0 <= self.seed < 2**32, f"--seed {self.seed}: must be at least 0 and below 2**32")
        require(self.view_tokens >= 0, f"--view_tokens {self.view_tokens}: must be at least 0")
        self.share()
        launched()
        self.suites()

    def folders(self) -> dict[Path, RunConfig]:
        """Folder of results → the model whose cells go there."""
        if not self.runs:
            return {Path(self.out): RunConfig(self.model, self.adapter)}
        chosen = split(self.only) or list(self.runs)
        return {Path(self.out) / name: self.runs[name] for name in chosen}

    def suites(self) -> list[Suite]:
        """The benchmarks, each with all its options; a data_dir is never handed from one to another."""
        named = split(self.benchmark)
        require(not (named and self.benchmarks), "--benchmark or benchmarks: give one of them, and not both")
        entries = [dict(entry) for entry in self.benchmarks] or [_named(text) for text in named or ["ruler-local"]]
        if self.data_dir is not None:
            alone = len(entries) == 1 and "data_dir" not in entries[0]
            require(
                alone, f"--data_dir {self.data_dir}: say whose it is, as in --benchmark ruler:{self.data_dir},longbench"
            )
            entries[0]["data_dir"] = self.data_dir
        names = [option.name for option in dataclasses.fields(CellOptions) if option.name != "data_dir"]
        common = {name: getattr(self, name) for name in names}
        return [_suite({**common, **entry}) for entry in entries]

    def share(self) -> tuple[int, int]:
        """(i, n): this process does every n-th part of the work, from the i-th on."""
        if self.shard is None:
            return 0, 1
        parts = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        valid = parts is not None and int(parts[1]) < int(parts[2])
        require(valid, f"--shard {self.shard}: must be i/n with i from 0 to n − 1, such as 0/8")
        assert parts is not None
        return int(parts[1]), int(parts[2])


def launched() -> tuple[int, int]:
    """(i, n): this is the i-th of n processes that a launcher has started; (0, 1) without one.

    Raises
    ------
    UserError
        When the environment contradicts itself.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    valid = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
    require(valid, f"RANK={rank} WORLD_SIZE={size} in the environment: RANK must be from 0 to WORLD_SIZE − 1")
    return int(rank), int(size)


def split(value: Sequence[Any] | float | str | None) -> list[str]:
    """The items of a list, or of text with commas between them."""
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    return [text for text in (str(item).strip() for item in items) if text]


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    require(0 <= ratio < 1, f"--ratios {text}: must be a share of the cache, at least 0 and below 1")
    return ratio


def _named(text: str) -> dict[str, Any]:
    """`ruler:4096` → name and data_dir; a path stays whole."""
    name, _, data_dir = text.partition(":")
    if not data_dir or Path(text).exists():
        return {"name": text}
    return {"name": name, "data_dir": data_dir}


def _suite(options: dict[str, Any]) -> Suite:
    """An entry of `benchmarks`, checked as the command line checks its flags."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Suite, as_group=False)
    try:
        return Suite(**parser.parse_object(options).as_dict())
    except (ArgumentError, UserError) as error:
        raise UserError(f"benchmarks: {options.get('name', 'an entry')}: {error}") from error
