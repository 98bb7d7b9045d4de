"""On a GPU the caches of two forward passes hold the same keys, so that a view can tell what each press keeps."""

from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from kvpress.utils import compute_n_kept
from tiny import make_tiny, make_tiny_tokenizer

from sparsekv.evaluation.engine.caches import CacheMaker
from sparsekv.evaluation.engine.work import Cell, ContextWork, Question
from sparsekv.evaluation.matrix import view_maker
from sparsekv.evaluation.matrix.views import KeptEntries
from sparsekv.prompts import encode_prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PRESSES = ("snapkv", "adakv_snapkv", "streaming_llm", "key_rerotation_streaming_llm", "observed_attention", "think")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_presses_keep_is_told(family, dtype, monkeypatch):
    tokenizer = make_tiny_tokenizer()
    context, questions = encode_prompt(tokenizer, next(iter(topics.values()))[:1500], ["What?"], "")
    work = ContextWork(context, (Question(0, questions[0], 4),), ())
    cells = [Cell(press, 0.5) for press in PRESSES]
    monkeypatch.setattr(view_maker, "AT_ONCE", 2)
    shown = view_maker._show_cells(CacheMaker(make_tiny(family).to("cuda", dtype), tokenizer), work, cells, {})
    assert [type(cell) for cell in shown] == [KeptEntries] * len(cells)
    kept = {cell.press: cell.kept for cell in shown}
    length, count = context.shape[1], compute_n_kept(context.shape[1], 0.5)
    expected = [place < 4 or place >= length - (count - 4) for place in range(length)]
    assert (kept["streaming_llm"] == expected).all()
    assert (kept["key_rerotation_streaming_llm"] == expected).all()
    assert (kept["snapkv"].sum(-1) == count).all()
    assert (kept["observed_attention"].sum(-1) == count).all()
    assert (kept["adakv_snapkv"].sum((1, 2)) == 2 * count).all()
    assert kept["think"].all()


def test_attention_received_is_that_of_the_cpu():
    ids = make_tiny_tokenizer().encode(next(iter(topics.values()))[:1500], return_tensors="pt")
    model = make_tiny("llama")
    expected = view_maker._received(model, ids)
    assert np.abs(view_maker._received(model.cuda(), ids) - expected).max() < 1e-3
