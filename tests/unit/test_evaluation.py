"""Scores after eviction: equal to kvpress's own prefill, eviction and decoding."""

import math

import pytest
import torch
from kvpress import KVPressTextGenerationPipeline
from tiny import make_tiny, make_tiny_tokenizer
from transformers import DynamicCache

from sparsekv.evaluation.evicted import NO_PRESS, Sample, Score, evaluate_cells
from sparsekv.evaluation.needle import chat_frame, encode, needle_samples, text_samples
from sparsekv.evaluation.summary import TASKS, mean_interval, summarize
from sparsekv.presses import make_press

CELLS = [(NO_PRESS, 0.0), ("knorm", 0.5), ("snapkv", 0.5), ("expected_attention_head", 0.3)]


@pytest.fixture(scope="module")
def model():
    model = make_tiny("qwen3")
    for weight in model.parameters():
        weight.requires_grad_(False).mul_(3 if weight.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def rows(count: int, length: int) -> list[list[int]]:
    return torch.randint(10, 320, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("cell", CELLS)
def test_nll_equals_kvpress_prefill_evict_continue(model, cell):
    name, ratio = cell
    sample = text_samples(rows(1, 130), 100, 1)[0]
    (score,) = evaluate_cells(model, [sample], [cell])
    cache = DynamicCache()
    ids = torch.cat([sample.context, sample.suffix])[None]
    with torch.no_grad():
        if name == NO_PRESS:
            logits = model(ids).logits[0, 100:]
        else:
            with make_press(name, ratio)(model):
                model.model(ids[:, :100], past_key_values=cache)
            logits = model(ids[:, 100:], past_key_values=cache, position_ids=torch.arange(100, 130)[None]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], sample.suffix[1:])
    assert score.nll == pytest.approx(wanted.item(), abs=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_exact_means_that_greedy_decoding_gives_the_answer(model, tokenizer, cell):
    """The answer that kvpress's pipeline generates is exact; with its last token changed it is not."""
    name, ratio = cell
    context, question = "The tide table hangs by the door. " * 8, "Where does it hang?"
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    press = None if name == NO_PRESS else make_press(name, ratio)
    prepared = pipeline.preprocess(context, [question], "", 10_000)
    answers = []
    pipeline.tokenizer = _Recording(tokenizer, answers)
    pipeline._forward(prepared, max_new_tokens=4, press=press)
    asked, answer = prepared["questions_ids"][0][0], answers[0]
    wrong = answer.clone()
    wrong[-1] = (wrong[-1] + 1) % 320
    samples = [
        Sample(prepared["context_ids"][0], torch.cat([asked, given]), len(asked), "needle") for given in (answer, wrong)
    ]
    assert [score.exact for score in evaluate_cells(model, samples, [cell])] == [True, False]


class _Recording:
    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, answers

    def decode(self, ids, **kwargs):
        self.answers.append(ids.clone())
        return self.tokenizer.decode(ids, **kwargs)


def test_one_prefill_a_sample(model, monkeypatch):
    lengths = []
    handle = model.model.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    list(evaluate_cells(model, text_samples(rows(2, 120), 100, 2), CELLS))
    handle.remove()
    assert lengths.count(100) == 2
    assert lengths.count(20) == 2 * len(CELLS)


def test_needles_lie_in_the_context_and_are_asked_for_after_it(tokenizer):
    samples = needle_samples(tokenizer, rows(3, 400), 400, 8, seed=0)
    before, after = chat_frame(tokenizer)
    depths = set()
    for sample in samples:
        context, suffix = tokenizer.decode(sample.context), tokenizer.decode(sample.suffix)
        number = tokenizer.decode(sample.suffix[sample.answer_start :]).strip()
        assert len(sample.context) == 400
        assert context.startswith(before)
        assert f"is: {number}." in context
        assert after in suffix
        assert number not in suffix[: -len(number)]
        assert len(number) == 7
        depths.add(context.index(number))
    assert len(depths) == 8
    assert [s.suffix.tolist() for s in samples] == [
        s.suffix.tolist() for s in needle_samples(tokenizer, rows(3, 400), 400, 8, seed=0)
    ]


def test_without_a_chat_template_the_question_ends_its_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert chat_frame(tokenizer) == ("", "\n")
    assert encode(tokenizer, "") == []


def score(press: str, nll: float, exact: bool, task: str) -> Score:
    return Score(task, press, 0.5 if press != NO_PRESS else 0.0, nll, exact)


def test_the_table_compares_sample_by_sample():
    cells = [(NO_PRESS, 0.0), ("knorm", 0.5)]
    scores = {
        name: [score(press, nll + shift, nll < 2, task) for task in TASKS for press, _ in cells for nll in (1.0, 3.0)]
        for name, shift in (("base", 0.5), ("control", 0.1), ("trained", 0.0))
    }
    header, full, evicted = summarize("text", scores, cells)
    assert header == ["press, evicted", "base", "control", "trained", "trained against control"]
    assert [full[0], evicted[0]] == ["full cache", "knorm, 50%"]
    assert full[3].startswith(f"{math.exp(2):.2f} [{math.exp(1):.1f}")
    assert full[4] == "-9.5% [-9.5, -9.5]"  # every sample differs by 0.1 nats: no interval left
    assert summarize("needle", scores, cells)[1][1:4] == ["50% [9%, 91%]"] * 3
    assert summarize("needle", scores, cells)[1][4] == "+0 points [+0, +0]"


def test_intervals_hold_the_mean_and_shrink():
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(n, generator=generator).tolist() for n in (20, 500))
    for values in (few, many):
        mean, low, high = mean_interval(values)
        assert low < mean < high
    width = [interval[2] - interval[1] for interval in map(mean_interval, (few, many))]
    assert width[1] < width[0] / 2
