"""Presses by name, and the anchors' press: what it keeps, and that kvpress runs it like its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import KVPressTextGenerationPipeline, ScorerPress
from kvpress.utils import compute_n_kept
from tiny import make_tiny
from transformers import DynamicCache

from sparsekv.errors import UserError
from sparsekv.presses import PRESSES, AnchorPress, make_press
from sparsekv.training.anchor import AnchorConfig, AnchorSelector


@pytest.mark.parametrize("name", PRESSES)
def test_every_name_makes_a_fresh_scoring_press_of_that_ratio(name):
    one, other = make_press(name, 0.3), make_press(name, 0.7)
    assert isinstance(one, ScorerPress)
    assert one is not other
    assert (one.compression_ratio, other.compression_ratio) == (0.3, 0.7)
    other.compression_ratio = 0.5
    assert one.compression_ratio == 0.3
    if hasattr(one, "press"):
        assert one.press is not other.press
    assert make_press(name, 0).compression_ratio == 0


@pytest.mark.parametrize(
    ("name", "near"),
    [("snap_kv", "snapkv"), ("streamingllm", "streaming_llm"), ("expected_atention", "expected_attention")],
)
def test_unknown_names_are_refused_with_near_ones(name, near):
    with pytest.raises(UserError, match=f"unknown press '{name}'; did you mean {near}") as error:
        make_press(name, 0.5)
    assert "\n" not in str(error.value)


def test_a_name_near_to_none_lists_all():
    with pytest.raises(UserError, match=", ".join(sorted(PRESSES))):
        make_press("zzz", 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(UserError, match=rf"compression ratio {ratio} of press 'knorm' must be in \[0, 1\)"):
        make_press("knorm", ratio)


def kept_by(press, heads, length):
    """Positions that the press keeps of a context, a list of sets by row; the same for every head."""
    batch = len(press.input_ids)
    position = torch.arange(length, dtype=torch.float).view(1, 1, -1, 1).expand(batch, heads, -1, 4).contiguous()
    module = torch.nn.Module()
    module.head_dim = 4
    keys, _ = press.compress(module, position, position, position, None, {})
    rows = [[{int(x) for x in head[:, 0]} for head in row] for row in keys]
    assert all(head == row[0] for row in rows for head in row)
    return [row[0] for row in rows]


@settings(max_examples=100, deadline=None)
@given(
    flags=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    ratio=st.floats(0.05, 0.95),
    sink_size=st.integers(0, 4),
)
def test_anchor_press_keeps_sinks_then_the_newest_anchors_then_the_newest_rest(flags, ratio, sink_size):
    ids = torch.tensor(flags, dtype=torch.long)
    press = AnchorPress(ratio, lambda tokens: tokens.bool(), sink_size, torch.cat((ids, 1 - ids), dim=1))  # more than C
    for row, kept in zip(flags, kept_by(press, 2, 12), strict=True):
        anchors = [i for i, anchor in enumerate(row) if anchor]
        newest_first = anchors[sink_size:][::-1], [i for i in range(12) if not row[i]][::-1]
        order = anchors[:sink_size][::-1] + newest_first[0] + newest_first[1]
        assert kept == set(order[: compute_n_kept(12, ratio)])


def test_anchor_press_sees_the_recent_anchors_of_the_context_not_of_all_tokens(tiny_tokenizer):
    config = AnchorConfig(use_special=False, use_punctuation=False, sink_size=2, recent_size=3)
    selector = AnchorSelector(config, tiny_tokenizer)
    ids = torch.randint(50, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    assert kept_by(AnchorPress(0.75, selector, 2, ids), 2, 20) == [{0, 1, 17, 18, 19}]


@pytest.mark.parametrize("missing", ["selector", "input_ids"])
def test_anchor_press_without_its_inputs_says_so(missing):
    arguments = {"selector": lambda tokens: tokens.bool(), "input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="needs `selector` and `input_ids`"):
        AnchorPress(0.5, **arguments | {missing: None}).score(None, None, torch.ones(1, 1, 4, 2), None, None, {})


@torch.no_grad()
def test_anchor_press_works_in_kvpress_own_context(tiny_tokenizer):
    model, selector = make_tiny("llama"), AnchorSelector(AnchorConfig(recent_size=4), tiny_tokenizer)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    press, cache, whole = AnchorPress(0.5, selector, 4, ids), DynamicCache(), DynamicCache()
    with press(model):
        model.model(ids, past_key_values=cache)
    model.model(ids, past_key_values=whole)
    assert cache.get_seq_length() == 20
    score = press.score(None, None, whole.layers[0].keys, None, None, {})
    index = score.topk(20, dim=-1).indices[..., None].expand(-1, -1, -1, whole.layers[0].keys.shape[-1])
    assert torch.equal(cache.layers[0].keys, whole.layers[0].keys.gather(2, index))


def test_anchor_press_works_in_kvpress_own_pipeline(tiny_tokenizer):
    pipeline = KVPressTextGenerationPipeline(model=make_tiny("llama"), tokenizer=tiny_tokenizer)
    context, question = "The cat, having seen the dog, ran. " * 4, "Why?"
    press = AnchorPress(0.5, AnchorSelector(AnchorConfig(recent_size=4), tiny_tokenizer), 4)
    with pytest.raises(ValueError, match="needs `selector` and `input_ids`"):
        pipeline(context, question=question, press=press)
    press.input_ids = pipeline.preprocess(context, [question], "", 1000)["context_ids"]
    cache = DynamicCache()
    pipeline(context, question=question, press=press, cache=cache, max_new_tokens=5)
    length = press.input_ids.shape[1]
    assert cache.get_seq_length() == compute_n_kept(length, 0.5) < length
