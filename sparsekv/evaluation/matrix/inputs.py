"""All that an evaluation is given, loaded and checked before anything is written; only the weights come later."""

import functools
import heapq
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kvpress import BasePress
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from sparsekv.adapters import check_adapter
from sparsekv.errors import UserError, require
from sparsekv.evaluation.benchmarks.registry import CONTEXT_LENGTH, OF_ANY_LENGTH, load_benchmark
from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.comparison.results import check_results
from sparsekv.evaluation.engine.model_check import check_model, check_plain_logits
from sparsekv.evaluation.engine.work import NO_PRESS, Cell
from sparsekv.evaluation.matrix.cells import CellFolder, check_names
from sparsekv.evaluation.matrix.config import CellOptions, EvalConfig, RunConfig, Suite, split
from sparsekv.evaluation.matrix.encode import Encoder
from sparsekv.evaluation.matrix.jobs import Job
from sparsekv.files import check_writable, writing
from sparsekv.fingerprint import fingerprint
from sparsekv.models import (
    DTYPES,
    check_device,
    check_ids,
    load_config,
    load_generation_config,
    load_tokenizer,
    may_make_unknown_ids,
    model_fingerprint,
)
from sparsekv.presses import PRESSES, is_decoding, make_press, needs_question
from sparsekv.version import versions

LONGEST = 8  # contexts that are encoded to see whether a benchmark fits the model; the others are when they are due
JUDGES = ("kvpress", "transformers")  # packages that decide answers


@dataclass(frozen=True)
class Base:
    """A model without its weights, and its benchmarks with their presses checked.

    Parameters
    ----------
    config : PreTrainedConfig
    tokenizer : PreTrainedTokenizerBase
    fingerprint : str
        Of the weights.
    encoders : list of Encoder
        One a benchmark.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    encoders: list[Encoder]


@dataclass(frozen=True)
class Run:
    """A model with or without an adapter, and what is to be done with it.

    Parameters
    ----------
    out : Path
        Folder of its cells.
    model : RunConfig
    tokenizer : PreTrainedTokenizerBase
    jobs : list of Job
        One a benchmark.
    """

    out: Path
    model: RunConfig
    tokenizer: PreTrainedTokenizerBase
    jobs: list[Job]


def prepare(config: EvalConfig) -> list[Run]:
    """The runs of an evaluation. Writes nothing.

    Raises
    ------
    UserError
        For whatever cannot work: a model, adapter, device, benchmark or press, a context that is too long, a folder
        that cannot be written, a cell that was run otherwise or is corrupt.
    """
    with writing(Path(config.out), "--out"):  # a path that is too long cannot even be looked up
        check_writable(Path(config.out), "--out")
    require(config.dtype in ("auto", *DTYPES), f"--dtype {config.dtype}: choose auto, {', '.join(DTYPES)}")
    check_device(device(config), "--device")

    @functools.cache
    def base(name: str) -> Base:
        return _load_base(name, config)

    for model in config.folders().values():  # before benchmarks are made, which takes longer
        if model.adapter is not None:
            check_adapter(load_config(model.model, config.trust_remote_code), model.adapter, config.trust_remote_code)
    runs = [_prepare_run(config, out, model, base(model.model)) for out, model in config.folders().items()]
    for run in runs:
        cells = [folder for job in run.jobs for folder in job.cells.values()]
        check_names(cells)
        for folder in cells:
            folder.check()
    check_results(Path(config.out), "**/*" if config.runs else "*")
    return runs


def device(config: EvalConfig) -> str:
    """The device asked for, or a GPU if there is one: each process of a launcher its own."""
    if config.device not in (None, "cuda"):
        return str(config.device)
    if config.device is None and not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return "cuda"
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"  # Slurm may show a process only its own


def _load_base(name: str, config: EvalConfig) -> Base:
    model_config = load_config(name, config.trust_remote_code)
    check_model(model_config.get_text_config(), name)
    tokenizer = load_tokenizer(name, config.trust_remote_code)
    tokenizer.model_max_length = sys.maxsize  # lengths are checked here, and not also warned of
    configs = model_config, load_generation_config(name)
    encoders = [_load_encoder(name, suite, tokenizer, configs, config.seed) for suite in config.suites()]
    for encoder in encoders:
        _check_rows(encoder, model_config, name)
    return Base(model_config, tokenizer, model_fingerprint(name, model_config), encoders)


def _load_encoder(
    model: str,
    suite: Suite,
    tokenizer: PreTrainedTokenizerBase,
    configs: tuple[PreTrainedConfig, GenerationConfig],
    seed: int,
) -> Encoder:
    for press, ratio in suite.cells():
        make_press(press, ratio, tokenizer)
    positions = getattr(configs[0].get_text_config(), "max_position_embeddings", None)
    length = suite.context_length or (CONTEXT_LENGTH if suite.name in OF_ANY_LENGTH else None)
    cut = suite.context_length is None and suite.max_context_length is not None
    fits = cut or not (length and positions) or length <= positions
    require(fits, f"--context_length {length}: {model} has {positions} positions")
    benchmark = load_benchmark(
        suite.name,
        tokenizer,
        context_length=suite.context_length,
        data_dir=None if suite.data_dir is None else str(suite.data_dir),
        tasks=split(suite.tasks) or None,
        num_samples=suite.num_samples,
        seed=seed,
    )
    encoder = Encoder(tokenizer, positions, benchmark, suite, *configs)
    if benchmark.kind == "likelihood":
        check_plain_logits(configs[0].get_text_config(), model)
        _check_likelihood(benchmark, suite)
    for press, ratio in suite.cells():
        _check_growth(benchmark, press)
        _check_questions(benchmark, suite, press, make_press(press, ratio, tokenizer))
    return encoder


def _check_rows(encoder: Encoder, config: PreTrainedConfig, model: str) -> None:
    """Encode the rows that may not fit the model: all of them where its tokenizer has tokens that it does not know."""
    rows = encoder.benchmark.rows
    for number in range(len(rows)) if may_make_unknown_ids(encoder.tokenizer, config) else _extremes(rows):
        work = encoder.encode([number], [])
        for question in work.questions:
            for ids in (work.ids, question.ids, question.answer_ids):
                if ids is not None:
                    check_ids(ids, config, model)


def _extremes(rows: Sequence[dict[str, Any]]) -> set[int]:
    """Numbers of the rows with the longest contexts, the shortest question and the shortest answer."""
    numbers = range(len(rows))
    asked = min(numbers, key=lambda number: len(rows[number]["question"] + rows[number]["answer_prefix"]))
    answered = min(numbers, key=lambda number: len(rows[number]["answer"]))
    return {*heapq.nlargest(LONGEST, numbers, key=lambda number: len(rows[number]["context"])), asked, answered}


def _check_likelihood(benchmark: Benchmark, suite: Suite) -> None:
    """Refuse options without a meaning where the text that follows a context is scored, and nothing is written."""
    for flag in ("max_context_length", "max_new_tokens", "query_aware", "temperature", "num_generations"):
        value = getattr(suite, flag)
        require(
            value == getattr(CellOptions, flag),
            f"--{flag} {value}: has no meaning for --benchmark {benchmark.name}, which scores the text that follows",
        )
    for press, _ in suite.cells():
        require(
            not is_decoding(press),
            f"--presses {press}: evicts while an answer is written, and --benchmark {benchmark.name} has none written",
        )


def _check_questions(benchmark: Benchmark, suite: Suite, name: str, press: BasePress | None) -> None:
    """Refuse a row without the question that its press is to see."""
    if press is None or not suite.query_aware or not needs_question(press):
        return
    for number, row in enumerate(benchmark.rows):
        asked = bool(row["question"].strip())
        require(asked, f"--presses {name}: needs a question, and row {number} of --benchmark {benchmark.name} has none")


def _check_growth(benchmark: Benchmark, press: str) -> None:
    """Refuse a press that leaves most of the cache alone."""
    if not benchmark.grows or press == NO_PRESS or is_decoding(press):
        return
    decoding = sorted(name for name in PRESSES if is_decoding(name))
    mine = f"decoding_{press}"
    instead = mine if mine.partition(":")[0] in decoding else f"a press that does, of {', '.join(decoding)}"
    raise UserError(
        f"--presses {press}: evicts before the answer, but {benchmark.name}'s cache grows while it is written; "
        f"give {instead}"
    )


def _prepare_run(config: EvalConfig, out: Path, model: RunConfig, base: Base) -> Run:
    adapter_fingerprint = None
    if model.adapter is not None:
        adapter_fingerprint = fingerprint(Path(model.adapter))
    common = {
        "model": model.model,
        "model_fingerprint": base.fingerprint,
        "adapter": model.adapter,
        "adapter_fingerprint": adapter_fingerprint,
        "dtype": _dtype(config, base.config),
        "seed": config.seed,
        **{f"{name}_version": installed for name, installed in versions(JUDGES).items() if name in JUDGES},
    }
    jobs = []
    for encoder in base.encoders:
        rows, generations = len(encoder.benchmark.rows), encoder.suite.num_generations
        folders = {
            cell: CellFolder(out, described, rows, generations)
            for cell, described in _describe_cells(common, encoder, base.tokenizer)
        }
        jobs.append(Job(out, encoder, folders))
    return Run(out, model, base.tokenizer, jobs)


def _dtype(config: EvalConfig, model_config: PreTrainedConfig) -> str:
    saved = str(getattr(model_config, "dtype", None) or "float32").removeprefix("torch.")
    return saved if config.dtype == "auto" else config.dtype


def _describe_cells(
    common: dict[str, Any], encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell and its config.yaml: kvpress's keys, and under `sparsekv` all else that decides its answers.

    Raises
    ------
    UserError
        An unknown press or parameter, or a ratio that a press cannot give.
    """
    benchmark, suite = encoder.benchmark, encoder.suite
    options = ("num_samples", "context_length", "max_context_length", "enable_thinking", "query_aware")
    sampling = ("temperature", "top_p", "top_k", "num_generations")
    ours = {
        **common,
        "benchmark": benchmark.name,
        "benchmark_fingerprint": benchmark.fingerprint,
        "kind": benchmark.kind,
        "lower_is_better": sorted(benchmark.lower_is_better),
        "tasks": split(suite.tasks) or None,
        "chat_template": suite.chat_template and benchmark.kind == "generate",
        **{name: getattr(suite, name) for name in (*options, *sampling)},
    }
    for press, ratio in suite.cells():
        yield (
            Cell(press, ratio),
            {
                "dataset": benchmark.name,
                "data_dir": benchmark.data_dir,
                "model": common["model"],
                "press_name": press,
                "compression_ratio": ratio,
                "press_init_command": str(make_press(press, ratio, tokenizer)),
                "fraction": 1.0,
                "max_new_tokens": suite.max_new_tokens,
                "max_context_length": suite.max_context_length,
                "query_aware": suite.query_aware,
                "needle_depth": None,
                "model_kwargs": {"dtype": common["dtype"]},
                "seed": common["seed"],
                "sparsekv": ours,
            },
        )
