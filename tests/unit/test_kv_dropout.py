"""Eviction inside the forward: both implementations, every geometry, gradients, and leaving no trace."""

import contextlib
import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from kvpress import AdaKVPress, KnormPress, LeverageScorePress
from peft import LoraConfig, get_peft_model
from tiny import SHAPE, make_tiny
from transformers import DynamicCache, PhimoeConfig, PhimoeForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, repeat_kv

from sparsekv.errors import UserError
from sparsekv.training import eviction, kv_dropout, rules
from sparsekv.training.anchor import AnchorConfig, AnchorSelector
from sparsekv.training.choices import OWN_RULES, PRESS_RULES
from sparsekv.training.eviction import ForwardEviction
from sparsekv.training.hidden_states import last_hidden
from sparsekv.training.kv_dropout import KVDropoutContext, SDPAKVDropout
from sparsekv.training.plan import EvictionPlan

BOTH = pytest.mark.parametrize("context_class", [KVDropoutContext, SDPAKVDropout])
FAMILIES = ["llama", "qwen3", "qwen2", "mistral", "gemma3"]
RULES = sorted({*PRESS_RULES, *OWN_RULES})
LENGTH, CUT = 96, 76  # SnapKV's window is 64

PLANS = {
    "two_region": EvictionPlan("two_region", (70, CUT), ("snapkv", "anchor_random"), (0.6, 0.4), 3),
    "streaming": EvictionPlan("streaming", (), ("anchor_random",), (0.4,), 3),
    "global": EvictionPlan("global", (), ("knorm",), (0.4,), 3),
}


def plan_for(rule, ratio=0.3, cut=CUT):
    return EvictionPlan("two_region", (cut,), (rule,), (ratio,), 3)


def sharpened(model):
    """Weights scaled up, so that what a query sees shows in the logits."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2 if weight.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def selector(tiny_tokenizer):
    return AnchorSelector(AnchorConfig(recent_size=8), tiny_tokenizer)


@pytest.fixture
def model():
    return sharpened(make_tiny("llama")).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, context=None, **inputs):
    with context or contextlib.nullcontext():
        return model(ids, **inputs).logits


def difference(a, b):
    return float((a.float() - b.float()).abs().max())


# --- the two implementations agree -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("geometry", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_implementations_agree(family, geometry, padded, selector, ids):
    model = sharpened(make_tiny(family)).eval()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    real = mask.bool()
    by_interface, by_patch = (kind(model, PLANS[geometry], selector) for kind in (KVDropoutContext, SDPAKVDropout))
    one, other = (logits(model, ids, context, attention_mask=mask) for context in (by_interface, by_patch))
    assert one.isfinite().all()
    assert difference(one[real], other[real]) <= 1e-5 * max(1.0, float(one.abs().max()))
    assert difference(one[real], logits(model, ids, attention_mask=mask)[real]) >= 1e-2
    evicted = [i for i, kind in enumerate(getattr(model.config, "layer_types", None) or []) if kind == "full_attention"]
    layers = evicted or list(range(model.config.num_hidden_layers))
    assert sorted(by_interface.last.keeps) == sorted(by_patch.last.keeps) == layers
    for layer in layers:
        assert all(map(torch.equal, by_interface.last.keeps[layer], by_patch.last.keeps[layer]))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_padding_take_the_fast_path(family, selector, ids, monkeypatch):
    calls = []
    fast = eviction.two_region_attention
    monkeypatch.setattr(eviction, "two_region_attention", lambda *args: calls.append(1) or fast(*args))
    model = make_tiny(family).eval()
    context = KVDropoutContext(model, PLANS["two_region"], selector)
    logits(model, ids, context)
    logits(model, ids, context, attention_mask=torch.ones_like(ids))
    assert len(calls) == 2 * len(context.last.keeps) > 0


@BOTH
def test_documents_packed_in_a_row_still_do_not_see_each_other(context_class, model, selector, ids):
    """Positions that start again make transformers mask by document: that mask holds beside ours."""
    start, plan = 40, plan_for("knorm")
    positions = torch.cat((torch.arange(start), torch.arange(LENGTH - start)))[None].expand(len(ids), -1)
    other = torch.cat((ids.flip(-1)[:, :start], ids[:, start:]), dim=1)
    alone = context_class(model, EvictionPlan("two_region", (CUT,), ("streaming_llm",), (0.99,)), selector)
    one, two = (logits(model, x, alone, position_ids=positions)[:, start:] for x in (ids, other))
    assert difference(one, two) <= 1e-5
    by_both = [
        logits(model, ids, kind(model, plan, selector), position_ids=positions)
        for kind in (KVDropoutContext, SDPAKVDropout)
    ]
    assert difference(*by_both) <= 1e-5


@BOTH
def test_sliding_layers_are_untouched(context_class, selector, ids):
    model = make_tiny("gemma3").eval()
    kinds = model.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    with torch.no_grad(), context_class(model, plan_for("knorm"), selector):
        evicted = model(ids, output_hidden_states=True).hidden_states
    with torch.no_grad():
        full = model(ids, output_hidden_states=True).hidden_states
    first = kinds.index("full_attention")
    assert difference(evicted[first], full[first]) <= 1e-6
    assert difference(evicted[first + 1], full[first + 1]) >= 1e-3


@BOTH
def test_what_kvpress_leaves_in_the_layers_changes_nothing(context_class, selector, ids):
    """It gives each the decoder's rotary embedding, which for Gemma 3 has to be asked for the layer's type."""
    model = make_tiny("gemma3", layer_types=["full_attention"] * 2).eval()
    plan = plan_for("expected_attention")
    before = logits(model, ids, context_class(model, plan, selector))
    with torch.no_grad(), KnormPress(0.5)(model):
        model(ids[:1])
    left = [layer.self_attn.rotary_emb for layer in model.model.layers]
    assert torch.equal(logits(model, ids, context_class(model, plan, selector)), before)
    assert [layer.self_attn.rotary_emb for layer in model.model.layers] == left


@BOTH
def test_an_embedding_that_would_take_a_layer_type_of_a_model_without(context_class, selector, ids):
    """PhiMoE's: its layers are all of one type, and its configuration names none."""
    torch.manual_seed(0)
    model = sharpened(PhimoeForCausalLM(PhimoeConfig(**SHAPE, num_local_experts=2))).eval()
    plan = plan_for("expected_attention")
    dense, evicted = (logits(model, ids, kind(model, plan, selector)) for kind in (SDPAKVDropout, context_class))
    assert difference(evicted, dense) <= 1e-5
    assert difference(evicted, logits(model, ids)) >= 1e-2


@BOTH
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotary_frequencies_that_follow_the_length_stay_as_they_were(context_class, family, selector, ids):
    """Expected attention asks for positions far beyond those of the row."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = sharpened(make_tiny(family, rope_parameters=dynamic, max_position_embeddings=128)).eval()
    if family == "qwen3":  # so that its layers are asked for their queries
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2
    before = logits(model, ids)
    evicted = logits(model, ids, context_class(model, plan_for("expected_attention"), selector))
    assert difference(evicted, before) >= 1e-2
    assert torch.equal(logits(model, ids), before)


@BOTH
def test_a_window_shorter_than_the_row_leaves_nothing_to_evict(context_class, selector, ids):
    model = make_tiny("mistral").eval()
    model.config.sliding_window = 32
    context = context_class(model, plan_for("knorm"), selector)
    assert torch.equal(logits(model, ids, context), logits(model, ids))
    assert context.last.keeps == {}
    with pytest.raises(UserError, match="none of its layers evicted"):
        context.last.keep_ratio()


@BOTH
def test_bf16(context_class, model, selector, ids):
    half = copy.deepcopy(model).bfloat16()
    context = context_class(half, plan_for("anchor_random"), selector)
    got = logits(half, ids, context)
    wanted = logits(model, ids, context_class(model, plan_for("anchor_random"), selector))
    assert got.dtype == torch.bfloat16
    assert difference(got, wanted) <= 0.05 * float(wanted.abs().max())
    assert difference(got, logits(half, ids)) >= 0.05 * float(wanted.abs().max())


class BypassingAttention(LlamaAttention):
    """Attention that calls `scaled_dot_product_attention` itself, with keys repeated, as much remote code does."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=attention_mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("geometry", PLANS)
def test_the_patch_reaches_models_that_bypass_the_interface(geometry, padded, model, selector, ids):
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0 if padded else 1
    real = mask.bool()
    bypassing = copy.deepcopy(model)
    for layer in bypassing.model.layers:
        layer.self_attn.__class__ = BypassingAttention
    full = logits(model, ids, attention_mask=mask)[real]
    assert difference(logits(bypassing, ids, attention_mask=mask)[real], full) <= 1e-5
    wanted = logits(model, ids, KVDropoutContext(model, PLANS[geometry], selector), attention_mask=mask)[real]
    got = logits(bypassing, ids, SDPAKVDropout(bypassing, PLANS[geometry], selector), attention_mask=mask)[real]
    assert difference(wanted, full) >= 1e-2
    assert difference(got, wanted) <= 1e-5


# --- gradients -------------------------------------------------------------------------------------------------------


def adapted_model(family="llama", dropout=0.0):
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(sharpened(make_tiny(family)), lora).train()


def lora_gradients(context_class, checkpointing, plan, selector, ids, mask=None, dropout=0.0, family="llama"):
    """Gradients of every adapter weight, as one vector."""
    model = adapted_model(family, dropout)
    for module in kv_dropout.attention_modules(model.get_base_model().model):
        module.attention_dropout = dropout
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    torch.manual_seed(7)
    with context_class(model, plan, selector) as context:
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert context.last.recomputed == (checkpointing is not None)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rule", ["random", "snapkv"])
@BOTH
def test_checkpointing_leaves_gradients_exactly_as_they_were(context_class, rule, padded, dropout, selector, ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0 if padded else 1
    arguments = (plan_for(rule), selector, ids, mask, dropout)
    plain = lora_gradients(context_class, None, *arguments)
    assert plain.abs().max() > 0
    for kind in ("reentrant", "non_reentrant"):
        assert torch.equal(lora_gradients(context_class, kind, *arguments), plain), kind


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@BOTH
def test_checkpointing_on_other_families(context_class, family, selector, ids):
    plain, *checked = (
        lora_gradients(context_class, kind, PLANS["two_region"], selector, ids, family=family)
        for kind in (None, "reentrant", "non_reentrant")
    )
    assert all(torch.equal(gradients, plain) for gradients in checked)


@pytest.mark.parametrize("geometry", PLANS)
def test_both_implementations_have_the_same_gradients(geometry, selector, ids):
    one, other = (
        lora_gradients(kind, None, PLANS[geometry], selector, ids) for kind in (KVDropoutContext, SDPAKVDropout)
    )
    assert difference(one, other) <= 1e-5 * max(1.0, float(one.abs().max()))


def test_gradients_differ_from_those_of_full_attention(selector, ids):
    """Else the tests above would pass with no eviction at all."""
    model = adapted_model()
    model(ids, labels=ids).loss.backward()
    full = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    evicted = lora_gradients(KVDropoutContext, None, plan_for("snapkv"), selector, ids)
    assert difference(evicted, full) >= 0.05 * float(full.abs().max())


@pytest.mark.parametrize("padded", [False, True])
@BOTH
def test_closing_before_a_checkpointed_backward_warns(context_class, padded, selector, ids):
    model = adapted_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0 if padded else 1
    context = context_class(model, plan_for("knorm"), selector)
    with pytest.warns(UserWarning, match="closed before backward"), context:
        model(ids, attention_mask=mask)
    assert context.last.keeps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), context:  # nothing to recompute
            model(ids)
        with context, context_class(model, plan_for("tova"), selector):  # only the inner one has decided
            model(ids, labels=ids).loss.backward()


# --- leaving no trace ------------------------------------------------------------------------------------------------


def traces(model):
    """Everything a context may touch, by value or identity."""
    return {
        "implementation": model.config._attn_implementation,
        "function": F.scaled_dot_product_attention,
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "state": list(model.state_dict()),
    }


@pytest.mark.parametrize("training", [False, True])
@BOTH
def test_everything_is_restored_on_exit(context_class, training, model, selector, ids):
    model.train(training)
    full = logits(model, ids)  # kvpress's wrapper leaves an attribute in a model's first forward: not ours
    before = traces(model)
    evicted = logits(model, ids, context_class(model, plan_for("expected_attention"), selector))
    assert difference(evicted, full) >= 1e-2
    assert traces(model) == before
    assert torch.equal(logits(model, ids), full)


@BOTH
def test_everything_is_restored_after_an_exception(context_class, model, selector, ids, monkeypatch):
    full = logits(model, ids)
    before = traces(model)

    def fail(*args, **kwargs):
        raise RuntimeError("deliberate")

    with monkeypatch.context() as patch:
        patch.setattr(KnormPress, "score", fail)  # in the middle of a layer
        with pytest.raises(RuntimeError, match="deliberate"):
            logits(model, ids, context_class(model, plan_for("knorm"), selector))
    assert traces(model) == before
    assert torch.equal(logits(model, ids), full)


@BOTH
def test_a_context_survives_a_failed_forward(context_class, model, selector, ids, monkeypatch):
    wanted = logits(model, ids, context_class(model, plan_for("knorm"), selector))

    def fail(*args, **kwargs):
        raise RuntimeError("deliberate")

    with context_class(model, plan_for("knorm"), selector):
        with monkeypatch.context() as patch:
            patch.setattr(KnormPress, "score", fail)
            with pytest.raises(RuntimeError, match="deliberate"):
                logits(model, ids)
        assert torch.equal(logits(model, ids), wanted)


def test_a_failed_layer_is_forgotten(model, selector, ids, monkeypatch):
    """Attention outside of the model's layers is never evicted, also after one of them broke off."""
    tensors = torch.randn(3, 1, 4, LENGTH, 16)
    wanted = F.scaled_dot_product_attention(*tensors)

    def fail(*args, **kwargs):
        raise RuntimeError("deliberate")

    with SDPAKVDropout(model, plan_for("anchor"), selector):
        monkeypatch.setattr(model.model.layers[0].self_attn.q_proj, "forward", fail)
        with pytest.raises(RuntimeError, match="deliberate"):
            logits(model, ids)
        assert torch.equal(F.scaled_dot_product_attention(*tensors), wanted)


@BOTH
def test_failing_half_way_into_entering_restores_too(context_class, model, selector, monkeypatch):
    before = traces(model)
    rotary_visible = kv_dropout._rotary_visible

    def fail(module, decoder):
        if module is model.model.layers[-1].self_attn:
            raise RuntimeError("deliberate")
        return rotary_visible(module, decoder)

    with monkeypatch.context() as patch:
        patch.setattr(kv_dropout, "_rotary_visible", fail)
        with pytest.raises(RuntimeError, match="deliberate"), context_class(model, plan_for("knorm"), selector):
            pass
    assert traces(model) == before


@BOTH
def test_a_forward_of_accelerate_stays_in_its_place(context_class, model, selector, ids):
    """accelerate puts a forward of its own into modules that it moves to their device."""
    wanted = logits(model, ids, context_class(model, plan_for("tova"), selector))
    called = []

    def moving(forward, *args, **kwargs):
        called.append(forward)
        return forward(*args, **kwargs)

    modules = [layer.self_attn for layer in model.model.layers]
    for module in modules:
        module.forward = functools.partial(moving, module.forward)
    before = [module.forward for module in modules]
    with context_class(model, plan_for("knorm"), selector):  # and a context inside of another
        assert torch.equal(logits(model, ids, context_class(model, plan_for("tova"), selector)), wanted)
    assert len(called) == len(modules)
    assert [module.forward for module in modules] == before


@BOTH
def test_presses_score_without_dropout_and_gradient(context_class, model, selector, ids, monkeypatch):
    states = []

    def score(press, module, hidden_states, keys, *args, **kwargs):
        states.append((any(m.training for m in module.modules()), torch.is_grad_enabled()))
        return keys.norm(dim=-1)

    monkeypatch.setattr(KnormPress, "score", score)
    model.train()
    with context_class(model, plan_for("knorm"), selector):
        model(ids)
    assert states == [(False, False)] * model.config.num_hidden_layers
    assert all(module.training for module in model.modules())


@BOTH
@pytest.mark.parametrize("rule", [*PRESS_RULES, *OWN_RULES])
def test_scoring_leaves_the_random_state_alone(rule, context_class, model, selector, ids):
    """Some draw a sketch: SKETCHING_RULES names them."""
    torch.manual_seed(0)
    logits(model, ids, context_class(model, plan_for(rule), selector))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("name", ["anchor", "streaming_llm", "knorm"])
def test_rules_that_read_no_layer_decide_once_for_all(name, model, selector, ids, monkeypatch):
    plan = EvictionPlan("two_region", (CUT, CUT + 5), (name, name), (0.3, 0.5), 3)
    calls = []
    decide = rules.PressRule.keep
    monkeypatch.setattr(rules.PressRule, "keep", lambda rule, context: calls.append(1) or decide(rule, context))
    with KVDropoutContext(model, plan, selector) as context:
        once = logits(model, ids)
        keeps, layers = context.last.keeps, model.config.num_hidden_layers
    assert len(calls) == (2 if name != "knorm" else 2 * layers)
    monkeypatch.setattr(rules.PressRule, "same_in_all_layers", False)
    with KVDropoutContext(model, plan, selector) as context:
        assert torch.equal(logits(model, ids), once)
        for layer in range(layers):
            assert all(map(torch.equal, context.last.keeps[layer], keeps[layer]))


# --- nesting and the teacher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_class", [KVDropoutContext, SDPAKVDropout])
@pytest.mark.parametrize("outer_class", [KVDropoutContext, SDPAKVDropout])
def test_the_inner_context_decides_and_the_outer_resumes(outer_class, inner_class, model, selector, ids):
    outer_plan, inner_plan = plan_for("knorm"), plan_for("tova")
    alone = [logits(model, ids, KVDropoutContext(model, plan, selector)) for plan in (outer_plan, inner_plan)]
    full = logits(model, ids)
    assert difference(*alone) >= 1e-2
    with outer_class(model, outer_plan, selector):
        assert difference(logits(model, ids, inner_class(model, inner_plan, selector)), alone[1]) <= 1e-5
        assert difference(logits(model, ids), alone[0]) <= 1e-5
        assert difference(logits(model, ids, inner_class(model, None, selector)), full) <= 1e-5
        assert difference(logits(model, ids), alone[0]) <= 1e-5
    assert torch.equal(logits(model, ids), full)


@BOTH
def test_one_context_may_be_entered_again_after_it_closed(context_class, model, selector, ids):
    context = context_class(model, plan_for("knorm"), selector)
    first = logits(model, ids, context)
    assert torch.equal(logits(model, ids, context), first)


@BOTH
def test_full_attention_inside_is_the_plain_model(context_class, model, selector, ids):
    full = logits(model, ids)
    with context_class(model, plan_for("knorm"), selector) as context:
        evicted = logits(model, ids)
        with context.full_attention():
            assert torch.equal(logits(model, ids), full)
        with pytest.raises(RuntimeError, match="deliberate"), context.full_attention():
            raise RuntimeError("deliberate")
        assert torch.equal(logits(model, ids), evicted)


# --- padding and batches ---------------------------------------------------------------------------------------------


@pytest.fixture
def same_sketch(monkeypatch):
    """Leverage scores (and compactor's) sketch keys at random, from torch's global state: always the same here."""
    scores = LeverageScorePress.compute_leverage_scores

    def seeded(*args):
        torch.manual_seed(0)
        return scores(*args)

    monkeypatch.setattr(LeverageScorePress, "compute_leverage_scores", staticmethod(seeded))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(side, rule, model, selector, ids, same_sketch):
    """Row 0 has 9 tokens less; its cut, counted in its own tokens, is 9 less where the padding is on the left."""
    pad, cut = 9, 80
    mask = torch.ones_like(ids)
    batch = ids.clone()
    hidden = slice(0, pad) if side == "left" else slice(LENGTH - pad, None)
    mask[0, hidden], batch[0, hidden] = 0, 0
    context = KVDropoutContext(model, plan_for(rule, cut=cut), selector)
    with context:
        hidden_states = last_hidden(model, model, {"input_ids": batch, "attention_mask": mask})
    padded = model.lm_head(hidden_states)
    for row, own_cut in enumerate((cut - pad if side == "left" else cut, cut)):
        real = mask[row].bool()
        alone = batch[row : row + 1, real]
        wanted = logits(model, alone, KVDropoutContext(model, plan_for(rule, cut=own_cut), selector))
        assert difference(padded[row, real], wanted[0]) <= 1e-4
        assert difference(logits(model, alone)[0, own_cut:], wanted[0, own_cut:]) >= 1e-2


@pytest.mark.parametrize("rule", ["random", "anchor_random"])
@pytest.mark.parametrize("geometry", ["two_region", "global"])
def test_a_rows_draw_does_not_depend_on_its_batch(geometry, rule, model, selector, ids):
    cuts = (CUT,) if geometry == "two_region" else ()
    context = KVDropoutContext(model, EvictionPlan(geometry, cuts, (rule,), (0.4,), 3), selector)
    together = logits(model, ids, context)
    kept = {layer: keep for layer, (keep,) in context.last.keeps.items()}
    assert not torch.equal(kept[0], kept[1]), "layers draw independently"
    assert not torch.equal(kept[0][:, 0], kept[0][:, 1]), "heads draw independently"
    for row in (1, 0):
        alone = logits(model, ids[row : row + 1], context)
        assert all(torch.equal(context.last.keeps[layer][0][0], keep[row]) for layer, keep in kept.items())
        assert difference(alone[0], together[row]) <= 1e-5
    other_seed = EvictionPlan(geometry, cuts, (rule,), (0.4,), 4)
    assert difference(logits(model, ids, KVDropoutContext(model, other_seed, selector)), together) >= 1e-3


def test_keep_ratio_counts_real_entries_over_layers_heads_and_cuts(model, selector, ids):
    plan = EvictionPlan("two_region", (40, 80), ("knorm", "knorm"), (0.5, 0.25))
    context = KVDropoutContext(model, plan, selector)
    logits(model, ids, context)
    assert context.last.keep_ratio() == pytest.approx((20 + 20) / (40 + 80))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0  # 20 and 60 real tokens in its contexts
    logits(model, ids, context, attention_mask=mask)
    assert context.last.keep_ratio() == pytest.approx((10 + 15 + 20 + 20) / (20 + 60 + 40 + 80))


# --- refusals --------------------------------------------------------------------------------------------------------


@BOTH
def test_rows_that_end_before_the_cut_are_refused(context_class, model, selector, ids):
    for length in (CUT - 10, CUT):
        with pytest.raises(ValueError, match=f"cut {CUT} leaves no suffix in {length} tokens"):
            logits(model, ids[:, :length], context_class(model, plan_for("knorm"), selector))


@BOTH
def test_embeddings_without_tokens_are_refused(context_class, model, selector, ids):
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="needs input_ids"):
        logits(model, None, context_class(model, plan_for("knorm"), selector), inputs_embeds=embeddings)


def test_a_model_without_attention_layers_is_refused(selector):
    with pytest.raises(UserError, match="no attention layers"):
        kv_dropout.attention_modules(torch.nn.Linear(2, 2))


# --- beside kvpress --------------------------------------------------------------------------------------------------


@torch.no_grad()
def pressed_logits(model, press, ids):
    """Logits of the one token after a prefilled and evicted context."""
    cache = DynamicCache()
    with press(model):
        model.model(ids[:, :CUT], past_key_values=cache)
    return model(ids[:, CUT : CUT + 1], past_key_values=cache, position_ids=torch.tensor([[CUT]])).logits


@BOTH
def test_kvpress_is_unaffected_by_a_context_that_was_used(context_class, model, selector, ids, monkeypatch):
    """AdaKV masks heads by kvpress's wrapper of the attention function: it must be the one that runs."""
    presses = [KnormPress(0.7), AdaKVPress(KnormPress(0.7))]
    before = [pressed_logits(model, press, ids) for press in presses]
    assert difference(*before) >= 1e-3, "the wrapper has no effect here"
    training = logits(model, ids, context_class(model, plan_for("knorm"), selector))

    def fail(*args):
        raise AssertionError("training's seam is active inside kvpress")

    with monkeypatch.context() as patch:
        patch.setattr(ForwardEviction, "decide", fail)
        after = [pressed_logits(model, press, ids) for press in presses]
    assert all(map(torch.equal, before, after))
    assert torch.equal(logits(model, ids, context_class(model, plan_for("knorm"), selector)), training)


@pytest.mark.parametrize("geometry", PLANS)
def test_autocast(geometry, model, selector, ids):
    """Under autocast the rotary embedding makes queries and keys fp32 beside bf16 values."""
    wanted = logits(model, ids, KVDropoutContext(model, PLANS[geometry], selector))
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, ids, KVDropoutContext(model, PLANS[geometry], selector))
    assert got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.float(), wanted, dim=-1).mean() > 0.99
