"""Test number one: training's mask gives the logits of a real kvpress prefill, eviction and continuation."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from kvpress import BasePress, KVPressTextGenerationPipeline
from peft import LoraConfig, get_peft_model
from tiny import make_tiny
from transformers import DynamicCache

from sparsekv.attention import global_mask
from sparsekv.presses import make_press
from sparsekv.training.anchor import AnchorConfig, AnchorSelector
from sparsekv.training.choices import OWN_RULES, PRESS_RULES
from sparsekv.training.eviction import ForwardEviction, row_seeds
from sparsekv.training.kv_dropout import KVDropoutContext, SDPAKVDropout
from sparsekv.training.plan import EvictionPlan
from sparsekv.training.rules import LayerContext, Rule, make_rule

RULES = sorted({*PRESS_RULES, *OWN_RULES})
CUT, LENGTH = 272, 284  # LagKV scores contexts of at least 260 tokens, SnapKV of more than 64
SEED = 5


@dataclass
class KeepPress(BasePress):
    """Evicts what a rule that is no press drops, inside kvpress's own hook."""

    rule: Rule
    ids: torch.Tensor

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        tensors = (hidden_states, keys, values, kwargs["position_embeddings"])
        context = LayerContext(module, *tensors, self.ids[:, : keys.shape[2]], None, row_seeds(self.ids, None, SEED))
        keep, count, *_ = self.rule.keep(context)
        index = keep.nonzero()[:, 2].view(*keep.shape[:2], count, 1).expand(-1, -1, -1, keys.shape[-1])
        return keys.gather(2, index), values.gather(2, index)


def inference_press(name, ratio, selector, ids, tokenizer):
    """The press that evicts at inference what the rule `name` drops in training."""
    if name == "anchor_random":
        return KeepPress(make_rule(name, ratio, selector), ids)
    if name == "anchor":
        return make_press(f"anchor:recent_size={selector.config.recent_size}", 1 - ratio, tokenizer)
    if name != "random":
        return make_press(name, 1 - ratio)
    press = make_rule(name, ratio, selector).press
    press.row_seeds = row_seeds(ids, None, SEED)
    return press


@contextlib.contextmanager
def same_draws_each_layer(model):
    """Presses that sketch at random (leverage, compactor) draw from torch's global state: seed it as training does."""

    def reseed(module, _):
        torch.manual_seed(SEED + module.layer_idx)

    hooks = [layer.self_attn.register_forward_pre_hook(reseed) for layer in model.model.layers]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def inference_logits(model, press, ids, cut, stop, step=None):
    """Logits of tokens [cut, stop) after kvpress has prefilled and evicted [0, cut)."""
    cache = DynamicCache()
    with press(model), same_draws_each_layer(model):
        model.model(ids[:, :cut], past_key_values=cache)
    logits = []
    for start in range(cut, stop, step or stop - cut):
        positions = torch.arange(start, min(start + (step or stop), stop))[None]
        logits.append(model(ids[:, positions[0]], past_key_values=cache, position_ids=positions).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def training_logits(model, plan, selector, ids, context=KVDropoutContext):
    with context(model, plan, selector):
        return model(ids).logits


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    model = make_tiny(request.param)
    for weight in model.parameters():  # sharper attention, or eviction would hardly show
        weight.requires_grad_(False).mul_(3 if weight.dim() > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def selector(tiny_tokenizer):
    return AnchorSelector(AnchorConfig(recent_size=8), tiny_tokenizer)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def difference(a, b):
    return float((a - b).abs().max())


def step_of(name):
    """Tokens fed at a time; None: all.

    PyramidKV's layers keep different numbers, and transformers makes one mask for all. Where heads share a budget
    kvpress hides entries behind a key that no query attends to, and for many queries there may be none.
    """
    return 1 if name in ("pyramidkv", "adakv_snapkv", "expected_attention") else None


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("name", RULES)
def test_training_logits_equal_kvpress_prefill_evict_continue(model, selector, ids, tiny_tokenizer, name, ratio):
    plan = EvictionPlan("two_region", (CUT,), (name,), (ratio,), SEED)
    trained = training_logits(model, plan, selector, ids)
    press = inference_press(name, ratio, selector, ids, tiny_tokenizer)
    tested = inference_logits(model, press, ids, CUT, LENGTH, step_of(name))
    with torch.no_grad():
        full = model(ids).logits
    assert difference(full[:, CUT:], tested) >= 1e-2, "eviction has no effect here: the comparison would prove nothing"
    assert difference(trained[:, CUT:], tested) <= 1e-4
    assert difference(trained[:, :CUT], full[:, :CUT]) <= 1e-4, "the context itself is prefilled with full attention"


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_the_anchor_press_keeps_in_kvpress_pipeline_what_the_rule_keeps(model, selector, tiny_tokenizer, ratio):
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tiny_tokenizer)
    context, question = "The cat, having seen the dog, ran; then it slept. " * 6, "Why?"
    evicted, whole = DynamicCache(), DynamicCache()
    press = inference_press("anchor", ratio, selector, None, tiny_tokenizer)
    pipeline(context, question=question, press=press, cache=evicted, max_new_tokens=2)
    ids = pipeline.preprocess(context, [question], "", 10_000)["context_ids"]
    model.model(ids, past_key_values=whole)
    for layer, (left, full) in enumerate(zip(evicted.layers, whole.layers, strict=True)):
        module = model.model.layers[layer].self_attn
        keep, count, *_ = make_rule("anchor", ratio, selector).keep(
            LayerContext(module, None, full.keys, full.values, None, ids, None, [0])
        )
        assert 0 < count < ids.shape[1]
        for held, computed in ((left.keys, full.keys), (left.values, full.values)):
            kept = computed[keep].view(*keep.shape[:2], count, -1)
            assert torch.equal(ordered(held), ordered(kept))


def ordered(entries):
    """The same entries of every head, ordered by their first channel: presses leave them in the order of scores."""
    return entries.gather(2, entries[..., 0].argsort(-1)[..., None].expand_as(entries))


@pytest.mark.parametrize("name", ["snapkv", "expected_attention", "leverage", "knorm"])
def test_parity_holds_with_an_adapter(selector, ids, name):
    """The presses see the adapted queries and keys, on both sides."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(make_tiny("llama"), lora).eval()
    for parameter in adapted.parameters():
        parameter.requires_grad_(False).mul_(3 if parameter.dim() > 1 else 1)
    plan = EvictionPlan("two_region", (CUT,), (name,), (0.3,), SEED)
    trained = training_logits(adapted, plan, selector, ids)[:, CUT:]
    tested = inference_logits(adapted.get_base_model(), make_press(name, 0.7), ids, CUT, LENGTH, step_of(name))
    with adapted.disable_adapter():
        unadapted = training_logits(adapted, plan, selector, ids)[:, CUT:]
    assert difference(unadapted, tested) >= 1e-2, "the adapter has no effect here"
    assert difference(trained, tested) <= 1e-4


def test_hiding_dropped_keys_from_every_query_is_not_what_inference_does(model, selector, ids, monkeypatch):
    def hidden_from_all(eviction, keeps, length):
        (keep,) = keeps
        suffix = torch.ones(*keep.shape[:2], length - keep.shape[2], dtype=torch.bool)
        return global_mask(torch.cat((keep, suffix), dim=-1))

    plan = EvictionPlan("two_region", (CUT,), ("snapkv",), (0.3,), SEED)
    tested = inference_logits(model, make_press("snapkv", 0.7), ids, CUT, LENGTH)
    assert difference(training_logits(model, plan, selector, ids, SDPAKVDropout)[:, CUT:], tested) <= 1e-4
    monkeypatch.setattr(ForwardEviction, "mask", hidden_from_all)
    assert difference(training_logits(model, plan, selector, ids, SDPAKVDropout)[:, CUT:], tested) >= 1e-2


def test_several_cuts_equal_the_dense_reference_and_the_first_segment_equals_kvpress(model, selector, ids):
    cuts, rules, ratios = (100, 180, 240), ("snapkv", "random", "anchor"), (0.3, 0.5, 0.7)
    plan = EvictionPlan("two_region", cuts, rules, ratios, SEED)
    fast = training_logits(model, plan, selector, ids)
    dense = training_logits(model, plan, selector, ids, SDPAKVDropout)
    assert difference(fast, dense) <= 1e-4
    tested = inference_logits(model, make_press("snapkv", 0.7), ids, cuts[0], cuts[1])
    assert difference(fast[:, cuts[0] : cuts[1]], tested) <= 1e-4
    once = training_logits(model, EvictionPlan("two_region", cuts[:1], rules[:1], ratios[:1], SEED), selector, ids)
    assert difference(fast[:, : cuts[1]], once[:, : cuts[1]]) <= 1e-4
    assert difference(fast[:, cuts[1] :], once[:, cuts[1] :]) >= 1e-2, "the later cuts have no effect here"
