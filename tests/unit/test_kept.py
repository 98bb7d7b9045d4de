"""What a cache says of the entries that its press kept is what the press chose."""

import math
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.utils import compute_n_kept
from tiny import make_tiny

from sparsekv.evaluation.engine.caches import CacheMaker, eager_attention
from sparsekv.evaluation.engine.evicted import EvictedCache, LayerEntries
from sparsekv.evaluation.engine.kept import kept_positions
from sparsekv.evaluation.engine.work import FULL_CACHE, Cell, ContextWork, Question
from sparsekv.presses import PRESSES, is_decoding, make_press, needs_eager, needs_question, shares_prefill, why_not
from sparsekv.prompts import encode_prompt

TEXT = next(text for text in topics.values() if len(text) > 1000)[:700]
SCORERS = ("knorm", "snapkv:window_size=16", "keydiff", "tova", "merging_knorm", "random", "observed_attention")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    model = make_tiny(request.param)
    with torch.no_grad():
        for weight in model.parameters():  # sharper attention, or heads would hardly differ
            weight.mul_(3)
    return model


def caches(model, tokenizer, *cells):
    """The full cache of a text, and the caches of these cells, from one forward pass."""
    ids, questions = encode_prompt(tokenizer, TEXT, ["What?"], "")
    work = ContextWork(ids, (Question(0, questions[0], 4),), ())
    maker = CacheMaker(model, tokenizer)
    with eager_attention(model, any(needs_eager(make_press(cell.press, cell.ratio)) for cell in cells)):
        made = maker.make(work, [FULL_CACHE, *cells])
    return maker, *(made[cell] for cell in (FULL_CACHE, *cells))


def rows_of(keys):
    """The bytes of each of a head's keys, [n, D]."""
    return [row.tobytes() for row in keys.numpy()]


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_every_press_that_shares_a_prefill(model, tiny_tokenizer, ratio):
    checked = 0
    for name in PRESSES.keys() - {"no_press", "think", "snap_think", "key_rerotation_streaming_llm"}:
        if is_decoding(name) or needs_question(press := make_press(name, ratio)) or why_not(name, model):
            continue
        if not shares_prefill(press) or name == "duo_attention_on_the_fly":
            continue
        _, full, evicted = caches(model, tiny_tokenizer, Cell(name, ratio))
        kept = kept_positions(full, evicted)
        assert kept.shape == (2, 2, full.layers[0].keys.shape[1])
        for layer, (whole, entries) in enumerate(zip(full.layers, evicted.layers, strict=True)):
            for head in range(2):
                count = entries.keys.shape[1] if entries.counts is None else int(entries.counts[head])
                held = set(rows_of(entries.keys[head, :count]))
                expected = [row in held for row in rows_of(whole.keys[head])]
                assert kept[layer, head].tolist() == expected, name
                assert sum(expected) == count, name
        checked += 1
    assert checked > 25


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_keep_the_highest_scores(model, tiny_tokenizer, name):
    cell, scores = Cell(name, 0.6), []
    ids, questions = encode_prompt(tiny_tokenizer, TEXT, ["What?"], "")
    maker = CacheMaker(model, tiny_tokenizer)
    press = maker.press(cell)
    press = getattr(press, "press", press)
    plain = press.score
    press.score = lambda *args, **kwargs: scores.append(plain(*args, **kwargs)) or scores[-1]
    with eager_attention(model, needs_eager(press)):
        made = maker.make(ContextWork(ids, (Question(0, questions[0], 4),), ()), [FULL_CACHE, cell])
    best = [score[0].topk(compute_n_kept(ids.shape[1], 0.6), dim=-1).indices for score in scores]
    expected = torch.stack([torch.zeros(2, ids.shape[1], dtype=torch.bool).scatter(1, index, True) for index in best])
    assert torch.equal(kept_positions(made[FULL_CACHE], made[cell]), expected)


def test_streaming_llm_keeps_sink_and_recent(model, tiny_tokenizer):
    _, full, evicted = caches(model, tiny_tokenizer, Cell("streaming_llm", 0.5))
    kept = kept_positions(full, evicted)
    length = kept.shape[-1]
    recent = compute_n_kept(length, 0.5) - 4
    assert (kept == torch.tensor([place < 4 or place >= length - recent for place in range(length)])).all()


def test_heads_that_share_a_budget_keep_numbers_of_their_own(model, tiny_tokenizer):
    _, full, evicted = caches(model, tiny_tokenizer, Cell("adakv_snapkv:window_size=16", 0.6))
    counts = kept_positions(full, evicted).sum(-1)
    assert (counts[:, 0] != counts[:, 1]).any()
    budget = 2 * compute_n_kept(full.layers[0].keys.shape[1], 0.6)
    assert counts.sum(-1).tolist() == [budget, budget]


def test_removed_channels_are_no_removed_tokens(model, tiny_tokenizer):
    _, full, whole = caches(model, tiny_tokenizer, Cell("think", 0.5))
    assert kept_positions(full, whole).all()
    ratio = 0.5
    tokens_alone = Cell("snapkv:window_size=16", 1 - math.sqrt(1 - ratio))  # the other share is channels
    both = Cell("snap_think:window_size=16", ratio)
    _, full, both_evicted, tokens = caches(model, tiny_tokenizer, both, tokens_alone)
    assert (both_evicted.layers[0].keys == 0).all(1).any(), "no channel is gone: nothing is shown"
    assert torch.equal(kept_positions(full, both_evicted), kept_positions(full, tokens))


def test_keys_that_moved_are_refused(model, tiny_tokenizer):
    _, full, evicted = caches(model, tiny_tokenizer, Cell("key_rerotation_streaming_llm", 0.5))
    with pytest.raises(ValueError, match=r"^what it keeps in layer 0 cannot be told by its keys$"):
        kept_positions(full, evicted)


def test_added_entries_are_refused(model, tiny_tokenizer):
    _, full = caches(model, tiny_tokenizer)
    more = EvictedCache(full.start)
    for entries in full.layers:
        keys = torch.cat([entries.keys, entries.keys[:, :1] + 1], dim=1)
        more.append(keys[None], keys[None], None)
    with pytest.raises(ValueError, match="layer 0"):
        kept_positions(full, more)


# ---- caches made here ----


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_mask_is_found_again(shape, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    heads, length, dim = shape
    position = torch.arange(length)[None, :, None] + 1.0  # no two keys of a head are the same
    keys = ((torch.rand(heads, 1, dim, generator=draw) + 0.5).sign() * position).to(dtype)
    keep = torch.rand(heads, length, generator=draw) < 0.5
    full, evicted = EvictedCache(length), EvictedCache(length)
    full.append(keys[None], keys[None], None)
    gone = (~keep).nonzero(as_tuple=True)
    evicted.append(keys[None], keys[None], (torch.zeros_like(gone[0]), *gone))
    assert torch.equal(kept_positions(full, evicted)[0], keep)


def test_equal_keys_can_be_told_only_together():
    keys = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]]])
    full = EvictedCache(4, [LayerEntries(keys, keys)])

    def cache(*places):
        return EvictedCache(4, [LayerEntries(keys[:, list(places)], keys[:, list(places)])])

    assert kept_positions(full, cache(2, 0)).tolist() == [[[True, False, True, False]]]
    assert kept_positions(full, cache(3, 1)).tolist() == [[[False, True, False, True]]]
    with pytest.raises(ValueError, match="layer 0"):
        kept_positions(full, cache(0, 1))
