"""On a GPU the step of the fixed-size cache is a CUDA graph over a kernel of our own: the same logits as without."""

import gc
import logging

import pytest
import torch
from tiny import VOCAB_SIZE, make_sharp, make_tiny_tokenizer
from torch._dynamo.utils import counters

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.inference import static_cache
from sparsekv.inference.anchor_cache import AnchorCache
from sparsekv.inference.static_attention import attend_masked
from sparsekv.inference.static_cache import StaticAnchorCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SELECTOR = AnchorSelector(AnchorConfig(sink_size=2, recent_size=4), make_tiny_tokenizer())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("rows", "heads", "shared", "dim"), [(1, 32, 8, 128), (8, 32, 8, 128), (3, 9, 3, 64), (2, 8, 1, 256)]
)
def test_the_kernel_at_real_sizes(dtype, limit, rows, heads, shared, dim):
    from sparsekv.inference.flash_decoding import flash_decoding  # needs Triton

    torch.manual_seed(rows)
    size = 3001
    query = torch.randn(rows, heads, 1, dim, device="cuda", dtype=dtype)
    keys, values = torch.randn(2, rows, shared, size, dim, device="cuda", dtype=dtype)
    counts = torch.randint(1, size + 1, (rows,), device="cuda")
    mask = (torch.arange(size, device="cuda") < counts[:, None])[:, None, None]
    wanted = attend_masked(query.double(), keys.double(), values.double(), mask, dim**-0.5)
    unread = ~mask.transpose(2, 3)
    found = flash_decoding(
        query, keys.masked_fill(unread, torch.nan), values.masked_fill(unread, torch.nan), counts, dim**-0.5
    )
    assert found.isfinite().all()
    assert (found - wanted).norm() / wanted.norm() < limit


def read(model, cache, ids, real, sizes) -> torch.Tensor:
    position, logits, start = (real.cumsum(-1) - 1).clamp(min=0), [], 0
    with torch.no_grad():
        for chunk in ids.split(sizes, dim=1):
            stop = start + chunk.shape[1]
            inputs = {"attention_mask": real[:, :stop], "position_ids": position[:, start:stop]}
            logits.append(model(input_ids=chunk, past_key_values=cache, **inputs).logits)
            start = stop
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_graph_gives_what_the_growing_cache_gives(family, compiled, caplog):
    torch._dynamo.reset()
    counters.clear()
    model = make_sharp(family, num_hidden_layers=4).cuda()
    sizes = [40, 1, 1, 1, 5, 1, 1, 1, 1, 1]  # with a later turn of several tokens between
    for length_of_first, room in ((40, 30), (30, 60)):
        sizes[0] = length_of_first
        ids = torch.randint(5, VOCAB_SIZE, (3, sum(sizes)), device="cuda")
        real = (torch.arange(sum(sizes), device="cuda") >= torch.tensor([[0], [7], [2]], device="cuda")).long()
        wanted = read(model, AnchorCache(model, selector=SELECTOR), ids, real, sizes)
        static = StaticAnchorCache(model, selector=SELECTOR, room=room, compiled=compiled)
        with caplog.at_level(logging.WARNING):
            found = read(model, static, ids, real, sizes)
        assert not caplog.records, "captured without a word"
        assert static_cache._steps[static].graph is not None
        assert (found - wanted)[real != 0].abs().max() < 1e-3
    if compiled:
        assert counters["stats"]["unique_graphs"] == 1, "one compilation for all layers, steps and sizes"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_generate(options):
    model = make_sharp("qwen3").cuda()
    ids = torch.randint(5, VOCAB_SIZE, (2, 50), device="cuda")
    found = []
    for cache in (
        AnchorCache(model, selector=SELECTOR, budget=20),
        StaticAnchorCache(model, selector=SELECTOR, budget=20, room=30),
    ):
        torch.manual_seed(0)
        asked = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
        found.append(model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **asked))
    assert torch.equal(*found)


def test_a_model_that_cannot_be_captured_says_so(caplog):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}  # looks at the positions to choose
    model = make_sharp("llama", rope_parameters=rope).cuda()
    ids, sizes = torch.randint(5, VOCAB_SIZE, (2, 36), device="cuda"), [30, 1, 1, 1, 1, 2]
    real = torch.ones_like(ids)
    wanted = read(model, AnchorCache(model, selector=SELECTOR), ids, real, sizes)
    with caplog.at_level(logging.WARNING):
        found = read(model, StaticAnchorCache(model, selector=SELECTOR, room=8), ids, real, sizes)
    assert "decoding without a CUDA graph" in caplog.text
    assert torch.rand(2, device="cuda").isfinite().all(), "a capture that fails would break every later draw"
    assert (found - wanted).abs().max() < 1e-3


def test_a_cache_that_is_gone_leaves_no_memory():
    model = make_sharp("llama").cuda()
    ids = torch.randint(5, VOCAB_SIZE, (1, 30), device="cuda")
    used = []
    for _ in range(4):
        cache = StaticAnchorCache(model, selector=SELECTOR, room=2000)
        read(model, cache, ids, torch.ones_like(ids), [28, 1, 1])
        del cache
        gc.collect()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1]
    assert not len(static_cache._steps)
