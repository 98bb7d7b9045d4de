"""Rules: kvpress's own budgets, row by row under padding, and draws that depend on row and layer alone."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import AdaKVPress
from kvpress.utils import compute_n_kept
from tiny import make_tiny
from transformers import DynamicCache

from sparsekv.errors import UserError
from sparsekv.presses import PRESSES, make_press
from sparsekv.training.anchor import AnchorConfig, AnchorSelector
from sparsekv.training.choices import (
    OWN_RULES,
    PRESS_RULES,
    SMOOTH_RULES,
    STATIC_RULES,
    check_rules,
)
from sparsekv.training.eviction import row_seeds
from sparsekv.training.rules import (
    AnchorRandomRule,
    AnchorRule,
    LayerContext,
    SeededRandomPress,
    SharedBudgetRule,
    make_rule,
)

RULES = sorted({*PRESS_RULES, *OWN_RULES})
LENGTHS = [*range(1, 18), 63, 64, 65, 66, 300]


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama").eval()


@pytest.fixture(scope="module")
def selector_with(tiny_tokenizer):
    """A selector of special tokens and, as the keywords say, sinks and recent tokens."""
    return lambda **config: AnchorSelector(AnchorConfig(use_punctuation=False, **config), tiny_tokenizer)


@pytest.fixture(scope="module")
def selector(selector_with):
    return selector_with(recent_size=2, sink_size=1)  # few anchors: budgets are met exactly


@pytest.fixture(scope="module")
def no_anchors(selector_with):
    return selector_with(recent_size=0, sink_size=0)  # among tokens that are not special


@pytest.fixture(scope="module")
def contexts(model):
    """(layer, real: Bool[B, C]) → a LayerContext of random hidden states, keys and values."""

    def make(layer, real):
        module, config = model.model.layers[layer].self_attn, model.config
        module.rotary_emb = model.model.rotary_emb
        batch, length = real.shape
        generator = torch.Generator().manual_seed(length)
        hidden = torch.randn(batch, length, config.hidden_size, generator=generator)
        shape = (batch, config.num_key_value_heads, length, module.head_dim)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        ids = torch.randint(50, 256, (batch, length), generator=generator)
        rotary = model.model.rotary_emb(hidden, torch.arange(length)[None])
        padding = None if real.all() else real
        return LayerContext(module, hidden, keys, values, rotary, ids, padding, row_seeds(ids, padding, 0))

    return make


@torch.no_grad()
def kept(name, ratio, selector, context):
    return make_rule(name, ratio, selector).keep(context)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("name", PRESS_RULES)
def test_as_many_are_kept_in_every_layer_as_kvpress_keeps(name, ratio, model, selector, contexts):
    length = 130
    ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    with torch.no_grad(), make_press(name, 1 - ratio)(model):
        model.model(ids, past_key_values=cache)
    for layer in range(model.config.num_hidden_layers):
        keep, count, _, even = kept(name, ratio, selector, contexts(layer, torch.ones(2, length, dtype=torch.bool)))
        assert keep.shape == (2, model.config.num_key_value_heads, length)
        assert keep.dtype == torch.bool
        assert (keep.sum((1, 2)) == count * keep.shape[1]).all()
        if even:
            assert (keep.sum(-1) == count).all()
            assert count == cache.layers[layer].keys.shape[2] < length
        else:  # kvpress hides what is evicted: its heads may keep unlike numbers
            masked = model.model.layers[layer].self_attn.masked_key_indices
            assert len(masked[0]) == keep.shape[1] * (length - count) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_share_a_budget_as_in_kvpress_also_between_equal_scores(dtype, monkeypatch):
    class Module(torch.nn.Module):
        config = SimpleNamespace(_attn_implementation="sdpa")

    scores = torch.randint(0, 12, (2, 3, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    press = make_press("expected_attention", 0.6)
    monkeypatch.setattr(type(press.press), "score", lambda *arguments: scores.clone())
    module, entries = Module(), torch.zeros(2, 3, 40, 4)
    press.compress(module, None, entries, entries, None, {})
    hidden = torch.zeros(2, 3, 40, dtype=torch.bool)
    hidden[module.masked_key_indices] = True
    kept = SharedBudgetRule(press.press, press.alpha_safeguard)._top(scores, 16)
    assert torch.equal(~kept.keep, hidden)


def test_pyramidkv_keeps_less_in_deeper_layers(selector, contexts):
    real = torch.ones(1, 300, dtype=torch.bool)
    first, second = (kept("pyramidkv", 0.6, selector, contexts(layer, real))[1] for layer in (0, 1))
    assert first > second


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 200), ratio=st.floats(0.01, 1.0), name=st.sampled_from(["anchor", "anchor_random", "random"])
)
def test_own_rules_keep_kvpress_budget(length, ratio, name, no_anchors, contexts):
    keep, count, *_ = kept(name, ratio, no_anchors, contexts(0, torch.ones(2, length, dtype=torch.bool)))
    assert (keep.sum(-1) == count).all()
    assert count == compute_n_kept(length, 1 - ratio)


@pytest.mark.parametrize("name", RULES)
def test_contexts_too_short_for_a_press_are_kept_whole(name, model, selector, contexts):
    """kvpress refuses or breaks on them; training must not stop at a short row."""
    for length in LENGTHS:
        keep, *_ = kept(name, 0.3, selector, contexts(0, torch.ones(1, length, dtype=torch.bool)))
        whole_at_kvpress = compute_n_kept(length, 0.7) == length or name not in PRESS_RULES
        if keep.all() and not whole_at_kvpress and name != "lagkv":  # which evicts even from its four sinks
            with (
                pytest.raises((AssertionError, RuntimeError)),
                torch.no_grad(),
                make_press(name, 0.7)(model),
            ):
                model.model(torch.ones(1, length, dtype=torch.long), past_key_values=DynamicCache())
    assert not keep.all(), "the longest is not too short for any"


@pytest.mark.parametrize("name", RULES)
def test_nothing_is_dropped_at_ratio_one(name, selector, contexts):
    keep, *_ = kept(name, 1.0, selector, contexts(1, torch.ones(2, 90, dtype=torch.bool)))
    assert keep.all()


@pytest.mark.parametrize("name", RULES)
def test_padding_is_never_kept_and_the_budget_counts_real_tokens(name, selector, contexts):
    real = torch.ones(4, 100, dtype=torch.bool)
    real[0, :20], real[1, 80:], real[2] = False, False, False
    keep, count, *_ = kept(name, 0.5, selector, contexts(1, real))
    assert count is None
    assert not keep[~real[:, None].expand_as(keep)].any()
    whole = [kept(name, 0.5, selector, contexts(1, torch.ones(1, n, dtype=torch.bool)))[1] for n in (80, 100)]
    assert keep.sum((1, 2)).tolist() == [2 * whole[0], 2 * whole[0], 0, 2 * whole[1]]
    if isinstance(make_rule(name, 0.5, selector), SharedBudgetRule):
        return
    assert keep.sum(-1).tolist() == [[whole[0]] * 2, [whole[0]] * 2, [0, 0], [whole[1]] * 2]


def test_anchors_beyond_the_budget_are_all_kept_and_the_count_is_unknown_where_rows_differ(no_anchors, contexts):
    context = contexts(0, torch.ones(2, 40, dtype=torch.bool))
    context.input_ids[1, 5:35] = 0  # special: 30 anchors, where the budget is 10
    keep, count, *_ = AnchorRandomRule(no_anchors, 0.25).keep(context)
    assert count is None
    assert keep.sum(-1).tolist() == [[10, 10], [30, 30]]
    keep, count, *_ = AnchorRandomRule(no_anchors, 0.75).keep(context)
    assert count == 30


def test_random_scores_depend_on_row_and_layer_and_on_nothing_else(contexts):
    both = contexts(0, torch.ones(2, 50, dtype=torch.bool))
    deeper = contexts(1, torch.ones(2, 50, dtype=torch.bool))

    def score(context, seeds):
        rows = context.keys[: len(seeds)]
        return SeededRandomPress(0.5, row_seeds=seeds).score(context.module, None, rows, None, None, {})

    together = score(both, [11, 22])
    torch.manual_seed(123)
    assert torch.equal(score(both, [22])[0], together[1])
    assert torch.equal(score(both, [11])[0], together[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0, 0], together[0, 1])
    assert not torch.equal(score(deeper, [11, 22]), together)
    assert together.shape == (2, 2, 50)


def test_row_seeds_depend_on_tokens_order_and_seed_but_not_on_padding():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 8, 7]])
    seeds = row_seeds(ids, None, 0).tolist()
    assert seeds[0] != seeds[1]
    assert row_seeds(ids, None, 1).tolist() != seeds
    assert row_seeds(ids, torch.ones_like(ids).bool(), 0).tolist() == seeds
    for left, right in ((3, 0), (0, 3), (1, 2)):
        padded = torch.nn.functional.pad(ids, (left, right), value=9)
        real = torch.nn.functional.pad(torch.ones_like(ids), (left, right)).bool()
        assert row_seeds(padded, real, 0).tolist() == seeds


@pytest.mark.parametrize(("name", "geometry"), [("snapkvv", "two_region"), ("snapkv", "streaming"), ("", "streaming")])
def test_a_rule_that_is_none_is_refused(selector_with, name, geometry):
    with pytest.raises(UserError, match=f"--rules names {name!r}"):
        make_rule(name, 0.5, selector_with(), geometry)


def test_streaming_rules_have_no_recent_anchors_of_the_row(selector_with, contexts):
    selector = selector_with(sink_size=3, recent_size=8)
    context = contexts(0, torch.ones(2, 40, dtype=torch.bool))
    rule = make_rule("anchor", 0.5, selector, "streaming")
    assert isinstance(rule, AnchorRule)
    keep, count, *_ = rule.keep(context)
    assert count is None
    assert keep.shape == (2, 2, 40)
    assert keep[..., :3].all()
    assert not keep[..., 3:].any()
    sampled, *_ = make_rule("anchor_random", 0.25, selector, "streaming").keep(context)
    assert (sampled.sum(-1) == 10).all()
    assert not sampled[..., -8:].all()


def test_a_rule_is_the_press_of_its_name(selector):
    for name in PRESS_RULES:
        rule, press = make_rule(name, 0.5, selector), make_press(name, 0.5)
        assert isinstance(rule, SharedBudgetRule) == isinstance(press, AdaKVPress)
        inner = press.press if isinstance(press, AdaKVPress) else press
        assert isinstance(rule.press, type(inner))
        assert rule.press.compression_ratio == 0.5
        for setting in dataclasses.fields(inner):
            if setting.name != "press":
                assert getattr(rule.press, setting.name) == getattr(inner, setting.name)


def test_heads_that_share_a_budget_keep_unlike_numbers_and_their_floor(selector, contexts):
    context = contexts(0, torch.ones(3, 200, dtype=torch.bool))
    context.values[:, 1] *= 100  # scores of this head are above all others
    keep, count, scores, even = kept("expected_attention", 0.5, selector, context)
    assert not even
    assert scores.shape == (3, 1, 400)
    assert count == 100
    assert keep.sum(-1).tolist() == [[20, 180]] * 3, "AdaKV's safeguard is a fifth of the budget"


@pytest.mark.parametrize("name", ["snapkv", "tova", "expected_attention", "critical_snapkv"])
def test_rules_score_without_waiting_for_the_gpu(name, selector):
    press = make_rule(name, 0.5, selector).press
    assert type(getattr(press, "press", press)).__module__ == "sparsekv.presses.without_waiting"


def test_unknown_rules_are_refused_by_name(selector):
    with pytest.raises(UserError, match="--rules names 'snapvk'; did you mean snapkv"):
        make_rule("snapvk", 0.5, selector)
    with pytest.raises(UserError, match=r"--rules names 'snapvk'; did you mean snapkv") as error:
        check_rules(["knorm", "snapvk"], "two_region")
    assert "\n" not in str(error.value)
    check_rules(RULES, "two_region")
    check_rules(RULES, "global")


@pytest.mark.parametrize("name", sorted(PRESSES.keys() - set(RULES)))
def test_a_press_without_a_rule_is_called_one(name):
    with pytest.raises(UserError, match=f"^--rules names '{name}', a press that training does not offer; take adakv_"):
        check_rules([name], "two_region")


def test_what_is_like_no_rule_gets_all_of_them():
    with pytest.raises(UserError, match=f"^--rules names 'zzz'; the rules are {', '.join(sorted(RULES))}$"):
        check_rules(["zzz"], "two_region")


def test_streaming_refuses_rules_that_look_ahead():
    check_rules(STATIC_RULES, "streaming")
    for name in set(RULES) - set(STATIC_RULES):
        with pytest.raises(UserError, match=f"'{name}', which looks at later tokens.*takes anchor, anchor_random"):
            check_rules([name], "streaming")


@pytest.mark.parametrize("name", sorted(PRESS_RULES))
def test_scores_of_smooth_rules_have_a_gradient(name, selector, contexts):
    context = contexts(1, torch.ones(2, 300, dtype=torch.bool))
    for tensor in (context.hidden_states, context.keys, context.values):
        tensor.requires_grad_()
    _, count, scores, _ = make_rule(name, 0.5, selector).keep(context)
    assert 0 < count < 300
    assert scores.requires_grad == (name in SMOOTH_RULES)
    if name in SMOOTH_RULES:
        finite = scores < 1e30
        scores[finite].sum().backward()
        reached = [x.grad for x in (context.hidden_states, context.keys, context.values) if x.grad is not None]
        assert any(bool(gradient.any()) for gradient in reached)
