"""What one prefill leaves to many presses is, bit for bit and in its order, what kvpress leaves to each alone."""

import weakref
import zlib
from pydoc_data.topics import topics

import kvpress
import pytest
import torch
from tiny import make_tiny, make_tiny_tokenizer
from transformers import DynamicCache

from sparsekv.evaluation.engine.caches import CacheMaker, eager_attention
from sparsekv.evaluation.engine.evicted import EvictedCache, take_masked
from sparsekv.evaluation.engine.prefill import prefill_alone, prefill_shared
from sparsekv.evaluation.engine.scores import OF_LAYER, Scores
from sparsekv.evaluation.engine.work import FULL_CACHE, Cell, ContextWork, Question
from sparsekv.presses import make_press

TOGETHER = (
    "snapkv",
    "snapkv:window_size=16",
    "streaming_llm",
    "critical_snapkv",
    "critical_expected_attention",
    "knorm",
    "keydiff",
    "lagkv:lag_size=32",
    "tova",
    "anchor",
)
BY_HEAD = ("expected_attention", "adakv_snapkv", "critical_adakv_snapkv")
RATIOS = (0.0, 0.3, 0.5, 0.7)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    model = make_tiny(request.param)
    with torch.no_grad():
        for weight in model.parameters():  # sharper attention, or scores would hardly differ
            weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    text = next(text for text in topics.values() if len(text) > 1000)[:700]
    return tokenizer(text, return_tensors="pt").input_ids


@torch.inference_mode()
def kept_alone(model, ids, press):
    """Keys, values and masked entries of every layer after kvpress's own way into the press."""
    cache = DynamicCache()
    with press(model):
        model.model(ids, past_key_values=cache, cache_position=torch.arange(ids.shape[1]))  # kvpress's hook reads it
    return [
        (layer.keys[0], layer.values[0], masked) for layer, masked in zip(cache.layers, take_masked(model), strict=True)
    ]


def make(model, tokenizer, ids, *cells):
    work = ContextWork(ids, (Question(0, ids[:, :4], 4),), ())
    return CacheMaker(model, tokenizer).make(work, cells)


def test_every_cache_is_the_one_that_kvpress_leaves(model, tokenizer, ids):
    names = (*TOGETHER, *BY_HEAD, "chunkkv", "merging_knorm", "think:window_size=8")
    cells = [Cell(name, ratio) for name in names for ratio in RATIOS if not ("think" in name and ratio > 0.5)]
    made = make(model, tokenizer, ids, FULL_CACHE, *cells)
    whole = [(layer.keys, layer.values) for layer in made[FULL_CACHE].layers]
    for cell in cells:
        alone = kept_alone(model, ids, make_press(cell.press, cell.ratio, tokenizer))
        for entries, (keys, values, masked), full in zip(made[cell].layers, alone, whole, strict=True):
            if masked is None:
                assert torch.equal(entries.keys, keys), cell
                assert torch.equal(entries.values, values), cell
                continue
            assert torch.equal(keys, full[0]), "nothing is removed"
            for head, count in enumerate(entries.counts):
                keep = torch.ones(keys.shape[1], dtype=torch.bool)
                keep[masked[2][masked[1] == head]] = False
                assert torch.equal(entries.keys[head, :count], keys[head, keep]), cell
                assert torch.equal(entries.values[head, :count], values[head, keep]), cell
    assert made[Cell("expected_attention", 0.5)].layers[0].counts.unique().numel() == 2, "heads share a budget"


def test_attention_weights_are_read_by_alike_presses(model, tokenizer, ids):
    cells = [Cell("observed_attention", ratio) for ratio in (0.3, 0.7)]
    made = make(model, tokenizer, ids, *cells)
    with eager_attention(model, True):
        for cell in cells:
            alone = kept_alone(model, ids, make_press(cell.press, cell.ratio))
            assert all(torch.equal(a.keys, b[0]) for a, b in zip(made[cell].layers, alone, strict=True))


def test_a_score_is_computed_once_a_layer(model, tokenizer, ids, monkeypatch):
    calls = []
    plain = kvpress.SnapKVPress.score
    monkeypatch.setattr(kvpress.SnapKVPress, "score", lambda self, *args: calls.append(0) or plain(self, *args))
    alike = ("snapkv", "critical_snapkv", "adakv_snapkv", "snapkv:window_size=64")
    made = make(model, tokenizer, ids, *(Cell(name, ratio) for name in alike for ratio in RATIOS))
    assert all(isinstance(cache, EvictedCache) for cache in made.values())
    assert len(calls) == 2, "layers"
    make(model, tokenizer, ids, Cell("snapkv", 0.5), Cell("snapkv:kernel_size=3", 0.5))
    assert len(calls) == 2 + 4, "other parameters, other scores"


@pytest.mark.parametrize("kind", OF_LAYER)
def test_shared_scores_do_not_read_the_ratio(model, ids, kind):
    class Blind(kind):
        compression_ratio = property(lambda self: pytest.fail("reads it"), lambda self, ratio: None)

    class Both(kvpress.ScorerPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            blind = object.__new__(Blind)
            vars(blind).update(vars(kind(0.5)))
            before = keys.clone(), values.clone()
            inputs = (module, hidden_states, keys, values, attentions, kwargs)
            assert torch.equal(blind.score(*inputs), kind(0.5).score(*inputs))
            assert torch.equal(keys, before[0]), "writes"
            assert torch.equal(values, before[1]), "writes"
            return keys, values

    with eager_attention(model, kind is kvpress.ObservedAttentionPress):
        kept_alone(model, ids, Both())


def test_random_draws_are_those_of_seed_context_key_and_layer(model, ids):
    made = prefill_shared(model, ids, {"full": None, "random 0.5": make_press("random", 0.5)}, seed=3)
    for layer in range(2):
        keys = made["full"].layers[layer].keys
        seed = zlib.crc32(f"random 0.5 {layer}".encode(), zlib.crc32(ids.numpy().tobytes(), 3))
        scores = torch.rand(keys.shape[:2], generator=torch.Generator().manual_seed(seed))
        expected = scores.topk(keys.shape[1] // 2).indices[..., None].expand(-1, -1, keys.shape[2])
        assert torch.equal(made["random 0.5"].layers[layer].keys, keys.gather(1, expected))


def test_known_scores_are_not_written_into(model, ids):
    scores = Scores()

    class Twice(kvpress.ScorerPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            scores.begin(module, hidden_states, keys, values, attentions, kwargs)
            press = make_press("adakv_snapkv", 0.5)
            before = scores(press.press).clone()
            scores.knowing(press).compress(*scores.inputs)
            assert torch.equal(scores(press.press), before)
            return keys, values

    kept_alone(model, ids, Twice())


@pytest.mark.parametrize("name", ["kvzip", "kvzip:layerwise=true", "kvzip_plus", "kvzip:chunk_size=100"])
def test_kvzip_replays_the_context_once_for_all_ratios(model, tokenizer, ids, name, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(model.config, "_name_or_path", str(tmp_path))
    cells = [Cell(name, ratio) for ratio in (0.3, 0.5, 0.7)]
    expected = [prefill_alone(model, ids, make_press(name, cell.ratio)) for cell in cells]
    passes = []
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: passes.append(0) or plain(*args, **kwargs))
    made = make(model, tokenizer, ids, FULL_CACHE, Cell("knorm", 0.5), Cell(name, 0.0), *cells)
    assert len(passes) == 1 + (-(-ids.shape[1] // 100) if "chunk" in name else 1)
    for cell, alone in zip(cells, expected, strict=True):
        assert made[cell].physical_bytes == alone.physical_bytes
        assert made[cell].start == alone.start
        for ours, theirs in zip(made[cell].layers, alone.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
            assert torch.equal(ours.counts, theirs.counts)
    full = made[FULL_CACHE].layers
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(made[Cell(name, 0.0)].layers, full, strict=True))
    assert all(layer.keys.shape[1] == ids.shape[1] for layer in full)


def test_kvzip_keeps_no_cache_alive(model, tokenizer, ids, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(model.config, "_name_or_path", str(tmp_path))
    maker, cell = CacheMaker(model, tokenizer), Cell("kvzip", 0.5)
    made = maker.make(ContextWork(ids, (Question(0, ids[:, :4], 4),), ()), [cell])
    cache = weakref.ref(made.pop(cell))
    assert cache() is None


def test_kvzip_that_fails_leaves_the_others(model, tokenizer, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(model.config, "_name_or_path", str(tmp_path / "nowhere"))
    made = make(model, tokenizer, ids, Cell("kvzip", 0.3), Cell("kvzip", 0.5), Cell("knorm", 0.5))
    assert [isinstance(made[Cell("kvzip", ratio)], Exception) for ratio in (0.3, 0.5)] == [True, True]
    assert isinstance(made[Cell("knorm", 0.5)], EvictedCache)
