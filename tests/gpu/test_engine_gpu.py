"""On a GPU the one-token step is a CUDA graph: it must give what the eager step gives."""

import itertools
from pydoc_data.topics import topics

import pytest
import torch
from tiny import make_tiny, make_tiny_tokenizer

from sparsekv.evaluation.engine import padded_forward
from sparsekv.evaluation.engine.engine import Engine
from sparsekv.evaluation.engine.work import FULL_CACHE, Cell, ContextWork, Question
from sparsekv.prompts import encode_prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PRESSES = ("snapkv", "knorm", "pyramidkv", "adakv_snapkv", "random")
CELLS = (FULL_CACHE, *(Cell(press, ratio) for press in PRESSES for ratio in (0.3, 0.7)))


def answers(model, tokenizer):
    works = []
    for number, text in enumerate(itertools.islice(topics.values(), 3)):
        context, questions = encode_prompt(tokenizer, text[: 700 + 100 * number], ["What is this?"], "It is")
        works.append(ContextWork(context, (Question(number, questions[0], 24),), CELLS))
    return {(each.row, each.cell): each.text for each in itertools.chain(*Engine(model, tokenizer).run(works))}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_graph_answers_as_the_eager_step(family, monkeypatch, caplog):
    model, tokenizer = make_tiny(family).cuda(), make_tiny_tokenizer()
    with torch.no_grad():
        for weight in model.parameters():  # sharper attention, or eviction would hardly show
            weight.mul_(3)
    captured = []
    plain = padded_forward.PaddedForward._capture
    monkeypatch.setattr(padded_forward.PaddedForward, "_capture", lambda *args: captured.append(plain(*args)))
    with_graph = answers(model, tokenizer)
    assert captured
    assert not caplog.records, "captured without a word"
    monkeypatch.setattr(padded_forward, "WORTH_A_GRAPH", 10**6)
    assert answers(model, tokenizer) == with_graph
    assert len(set(with_graph.values())) > len(CELLS)
