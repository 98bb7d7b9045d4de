"""Time of the press × ratio matrix: kvpress's pipeline, one cell and sample at a time, against the engine.

    python benchmarks/eval_matrix.py                                        # smollm2-135m, float32 on a CPU
    python benchmarks/eval_matrix.py --dtype bfloat16                       # the same on a GPU
    python benchmarks/eval_matrix.py --shape qwen3-8b --dtype bfloat16      # an 8B's shape, random weights: time only
    … --doc docs/evaluation.md                                              # write the figures there

Both answer the same rows of ruler-local in the same 13 cells in this one run, the engine first. The table gives
seconds, their ratio, the peak of memory, the mean score, and how many answers differ.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from kvpress import KVPressTextGenerationPipeline
from rich.console import Console
from shapes import SHAPES, make_model
from transformers.utils.logging import disable_progress_bar

from sparsekv.evaluation.benchmarks.registry import load_benchmark
from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.engine.engine import Engine
from sparsekv.evaluation.engine.work import FULL_CACHE, Answer, Cell, ContextWork, Question
from sparsekv.files import fill_block
from sparsekv.models import load_tokenizer
from sparsekv.presses import make_press
from sparsekv.prompts import encode_prompt
from sparsekv.version import commit

PRESSES = ("snapkv", "streaming_llm", "critical_snapkv", "knorm")
CELLS = [FULL_CACHE, *(Cell(press, ratio) for press in PRESSES for ratio in (0.3, 0.5, 0.7))]
TASKS = ("niah_single_2", "niah_multikey_1", "vt", "qa_1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--num_samples", type=int, default=1, help="contexts of each of the four tasks")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--doc", type=Path, help="Markdown file whose block for this shape and device is replaced")
    options = parser.parse_args()
    disable_progress_bar()

    tokenizer = load_tokenizer("smollm2-135m")
    model = make_model(options.shape, options.dtype, options.device)
    benchmark = load_benchmark(
        "ruler-local", tokenizer, context_length=options.context_length, tasks=TASKS, num_samples=options.num_samples
    )
    rows = benchmark.rows
    list(engine_answers(model, tokenizer, rows[:1], CELLS[:2]))  # warm up: kernels, allocator
    figures = {}
    for name, answer in (("engine", engine_answers), ("kvpress", kvpress_answers)):
        reset_peak(options.device)
        start = time.perf_counter()
        answers = dict(answer(model, tokenizer, rows, CELLS))
        figures[name] = (time.perf_counter() - start, peak_gib(options.device), answers)
    scores = {name: mean_score(benchmark, answers) for name, (*_, answers) in figures.items()}
    text = table(options, figures, scores, len(rows))
    Console().print(text, highlight=False)
    if options.doc:
        fill_block(options.doc, f"eval_matrix {options.shape} {options.device}", text)


def kvpress_answers(model: Any, tokenizer: Any, rows: list[dict], cells: list[Cell]) -> Iterator[tuple[Any, str]]:
    """(row, cell) → answer, as kvpress's evaluation asks for it."""
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    for cell in cells:
        press = make_press(cell.press, cell.ratio)
        for number, row in enumerate(rows):
            with torch.inference_mode():
                output = pipeline(
                    row["context"],
                    questions=[row["question"]],
                    answer_prefix=row["answer_prefix"],
                    press=press,
                    max_new_tokens=row["max_new_tokens"],
                )
            yield (number, cell), output["answers"][0]


def engine_answers(model: Any, tokenizer: Any, rows: list[dict], cells: list[Cell]) -> Iterator[tuple[Any, str]]:
    """(row, cell) → answer, by the engine."""
    works = []
    for number, row in enumerate(rows):
        context, questions = encode_prompt(tokenizer, row["context"], [row["question"]], row["answer_prefix"])
        works.append(ContextWork(context, (Question(number, questions[0], row["max_new_tokens"]),), tuple(cells)))
    for answers in Engine(model, tokenizer).run(works):
        for answer in answers:
            assert isinstance(answer, Answer), answer
            yield (answer.row, answer.cell), str(answer.text)


def mean_score(benchmark: Benchmark, answers: dict[Any, str]) -> float:
    """Over all rows and cells, in percent."""
    found = [
        benchmark.score({**benchmark.rows[number], "predicted_answer": text}) for (number, _), text in answers.items()
    ]
    return fmean(next(iter(scores.values())) for scores in found)


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Of this process: on its GPU since the last reset, on a CPU since it began (the engine runs first)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(
    options: argparse.Namespace,
    figures: dict[str, tuple[float, float, dict]],
    scores: dict[str, float],
    contexts: int,
) -> str:
    """The figures as Markdown."""
    (ours, our_peak, got), (theirs, their_peak, wanted) = figures["engine"], figures["kvpress"]
    assert got.keys() == wanted.keys()
    different = sum(got[key] != wanted[key] for key in wanted)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    weights = "" if options.shape == "smollm2-135m" else " (random weights)"
    size = f"{contexts} contexts × {len(CELLS)} cells = {len(wanted)} answers; seed 0"
    return (
        f"{options.shape}{weights}, {options.dtype}, {device}, torch {torch.__version__}; ruler-local "
        f"({', '.join(TASKS)}) at {options.context_length:,} tokens, {size}; commit {commit() or 'unknown'}.\n\n"
        "| | seconds | of kvpress's | peak GiB | mean score |\n| --- | --- | --- | --- | --- |\n"
        f"| kvpress's pipeline | {theirs:.1f} | 1 | {their_peak:.2f} | {scores['kvpress']:.2f} |\n"
        f"| engine | {ours:.1f} | {ours / theirs:.3f} | {our_peak:.2f} | {scores['engine']:.2f} |\n\n"
        f"Answers that differ: {different} of {len(wanted)}."
    )


if __name__ == "__main__":
    main()
