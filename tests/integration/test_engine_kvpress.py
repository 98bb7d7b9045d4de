"""On the real model: the engine's answers are, cell for cell, those of kvpress's own pipeline."""

import itertools

import pytest
import torch
from kvpress import KVPressTextGenerationPipeline

from sparsekv.evaluation.benchmarks.registry import load_benchmark
from sparsekv.evaluation.engine.engine import Engine
from sparsekv.evaluation.engine.work import FULL_CACHE, Cell, ContextWork, Question
from sparsekv.models import load_model, load_tokenizer
from sparsekv.presses import make_press
from sparsekv.prompts import encode_prompt

PRESSES = (
    "snapkv",
    "streaming_llm",
    "critical_snapkv",
    "adakv_snapkv",
    "expected_attention",
    "keydiff",
    "kvzip",
    "anchor",
)
CELLS = (FULL_CACHE, *(Cell(press, ratio) for press in PRESSES for ratio in (0.3, 0.7)))
NEW_TOKENS = 6


@pytest.mark.slow
def test_answers_are_those_of_kvpress():
    model, tokenizer = load_model("smollm2-135m", "float32"), load_tokenizer("smollm2-135m")
    tasks = ("niah_single_2", "qa_1")
    rows = load_benchmark("ruler-local", tokenizer, context_length=192, tasks=tasks, num_samples=1).rows
    assert {row["task"] for row in rows} == set(tasks)

    works = []
    for number, row in enumerate(rows):
        context, questions = encode_prompt(tokenizer, row["context"], [row["question"]], row["answer_prefix"])
        works.append(ContextWork(context, (Question(number, questions[0], NEW_TOKENS),), CELLS))
    found = {(a.row, a.cell): a.text for a in itertools.chain(*Engine(model, tokenizer).run(works))}

    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    expected = {}
    for cell, (number, row) in itertools.product(CELLS, enumerate(rows)):
        options = {"question": row["question"], "answer_prefix": row["answer_prefix"], "max_new_tokens": NEW_TOKENS}
        press = make_press(cell.press, cell.ratio, tokenizer)
        with torch.inference_mode():
            expected[number, cell] = pipeline(row["context"], press=press, **options)["answer"]
    assert found == expected
    assert len(set(expected.values())) > len(rows), "eviction changes answers, or this shows nothing"
