"""Presses score a layer by the queries that it has, whatever the model."""

from unittest.mock import Mock

import pytest
import torch
from kvpress import ExpectedAttentionPress, KVzipPress, SnapKVPress
from tiny import SHAPE, make_tiny
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from sparsekv.adapters import attach_lora
from sparsekv.evaluation.engine.scores import Scores
from sparsekv.presses import PRESSES, is_decoding, kvpress_knows, make_press, queries, why_not
from sparsekv.presses.queries import _known, all_known, own_queries
from sparsekv.presses.without_waiting import KVzip, without_waiting

LENGTH, WINDOW = 90, 8
OTHERS = {
    "cohere": {},  # turns neighbours
    "granite": {"attention_multiplier": 0.0625},  # another factor on the logits
    "hunyuan_v1_dense": {},  # a norm after the rotation
    "glm4": {},  # half of the entries, and neighbours
    "olmo2": {},  # a norm over all heads
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},  # a norm of its own class
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer without positions
}


def make_other(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SHAPE, **OTHERS[name]), attn_implementation="eager")
    with torch.no_grad():  # norms that do something, sharp attention
        for key, weight in model.named_parameters():
            if "q_norm" in key or "query_layernorm" in key:
                weight.uniform_(0.5, 2)
            elif "q_proj" in key or "k_proj" in key:
                weight.mul_(8)
    return model.eval()


@pytest.fixture(params=OTHERS)
def other(request):
    return make_other(request.param)


def read(model):
    """(module, input, keys, values, keyword arguments, attention [1, H, L, L]) of every layer, for one text."""
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda *given: seen.append((given[0], given[2])), with_kwargs=True)
        for layer in model.model.layers
    ]
    ids = torch.randint(5, 320, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache()
    with torch.no_grad():
        output = model.model(input_ids=ids, past_key_values=cache, output_attentions=True)
    for hook in hooks:
        hook.remove()
    for (module, kwargs), layer, attention in zip(seen, cache.layers, output.attentions, strict=True):
        module.rotary_emb = model.model.rotary_emb
        yield module, kwargs["hidden_states"], layer.keys, layer.values, kwargs, attention


def by_attention(attention, groups):
    """SnapKV's scores of what the window really attends to."""
    seen = attention[..., -WINDOW:, :-WINDOW].mean(-2)
    smooth = torch.nn.functional.avg_pool1d(seen, kernel_size=5, padding=2, stride=1)
    return smooth.unflatten(1, (groups, -1)).mean(2)


def test_snapkv_sees_what_the_window_attends_to(other):
    press = SnapKVPress(window_size=WINDOW, kernel_size=5)
    wrong = 0
    for module, hidden, keys, values, kwargs, attention in read(other):
        wanted = by_attention(attention, keys.shape[1])
        scores = without_waiting(press).score(module, hidden, keys, values, None, kwargs)[..., :-WINDOW]
        torch.testing.assert_close(scores, wanted, atol=1e-6, rtol=1e-4)
        known = kvpress_knows(module, hidden, kwargs["position_embeddings"])
        if not known:
            wrong += 1
            try:
                plain = press.score(module, hidden, keys, values, None, kwargs)[..., :-WINDOW]
            except RuntimeError:  # entries that are not turned
                continue
            assert not torch.allclose(plain, wanted, rtol=0.1)
    assert wrong > 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral"])
def test_what_kvpress_knows_is_left_to_it(family):
    model = make_tiny(family)
    assert all_known(model)
    model.set_attn_implementation("eager")
    for module, hidden, _, _, kwargs, _ in read(model):
        rotary = kwargs["position_embeddings"]
        assert kvpress_knows(module, hidden, rotary)
        own = without_waiting(ExpectedAttentionPress(n_future_positions=16))
        divisor, mean, covariance = own._own_statistics(module, hidden, rotary)
        wanted = own.get_query_statistics(module, hidden)
        assert divisor == pytest.approx(4)  # √16
        torch.testing.assert_close((mean, covariance), wanted, atol=1e-6, rtol=1e-4)


def test_expected_attention_turns_queries_as_the_layer_does(other):
    """Against every query at every future position."""
    press = without_waiting(ExpectedAttentionPress(n_future_positions=6, n_sink=4))
    for module, hidden, _, _, kwargs, _ in read(other):
        _, mean, covariance = press._own_statistics(module, hidden, kwargs["position_embeddings"])
        turned = []
        for position in range(LENGTH, LENGTH + 6):
            rotary = other.model.rotary_emb(hidden, torch.full((1, LENGTH - 4), position))
            turned.append(own_queries(module, hidden[:, 4:], rotary)[0])
        queries = torch.stack(turned).mean(0)
        centered = queries - queries.mean(2, keepdim=True)
        torch.testing.assert_close(mean, queries.mean(2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(covariance, centered.mT @ centered / queries.shape[2], atol=1e-5, rtol=1e-4)


def test_what_is_evaluated_is_scored_by_them(other):
    for module, *inputs, kwargs, attention in read(other):
        scores = Scores()
        scores.begin(module, *inputs, None, kwargs)
        found = scores(SnapKVPress(0.5, window_size=WINDOW, kernel_size=5))[..., :-WINDOW]
        torch.testing.assert_close(found, by_attention(attention, found.shape[1]), atol=1e-6, rtol=1e-4)


def test_presses_that_cannot_ask_are_named(other):
    who = f"it makes queries or turns keys as Llama does, and {type(other).__name__} does otherwise"
    for spec in ("finch", "think", "pyramidkv", "decoding_snapkv", "duo_attention_on_the_fly"):
        assert why_not(spec, other) == f"{spec}: {who}"
    for spec in ("no_press", "knorm", "anchor", "snapkv", "critical_snapkv", "expected_attention", "tova"):
        assert why_not(spec, other) is None
    assert "queries" not in (why_not("kvzip", other) or "")


def test_what_evicts_while_decoding_and_is_not_refused_goes_by_the_cache_alone(other):
    """Without a layer's input there is no query."""
    module, _, keys, values, *_ = next(read(other))
    decoding = {name for name in PRESSES if is_decoding(name)} - {"decoding_qfilter"}  # by files that are not here
    refused = {name for name in decoding if why_not(f"{name}:target_size=20", other)}
    for name in decoding - refused:
        press = make_press(f"{name}:target_size=20", 0.5).base_press
        assert press.score(module, None, keys, values, None, {}).shape == keys.shape[:3]
    asking = {name for name in decoding if any(part in name for part in ("snapkv", "tova", "expected_attention"))}
    assert asking < refused < decoding


def test_nothing_is_said_against_them_on_a_model_that_kvpress_knows(tiny_qwen3):
    for spec in ("think", "pyramidkv", "decoding_snapkv"):
        assert why_not(spec, tiny_qwen3()) is None


def test_asking_changes_nothing(other):
    before = other.config._attn_implementation
    for module, hidden, _, _, kwargs, _ in read(other):
        with pytest.raises(RuntimeError):
            own_queries(module, hidden[..., :-1], kwargs["position_embeddings"])
        query, _ = own_queries(module, hidden, kwargs["position_embeddings"])
        assert query.shape == (1, 4, LENGTH, 16)
    assert other.config._attn_implementation == before


def replay(kind, module, hidden, keys, values, kwargs):
    """KVzip's scores of a part of a context, where the last tokens repeat it."""
    press = kind(n_sink=2)
    press.start_idx, press.end_idx, press.context_length = 10, 40, 60
    press.score_val = torch.zeros(2, 1, keys.shape[1], 60)
    tokens = slice(60, LENGTH)
    rotary = tuple(x[:, tokens] for x in kwargs["position_embeddings"])
    return press._compute_cross_attention(module, hidden[:, tokens], keys, {"position_embeddings": rotary})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_kvzip_repeats_with_the_same_attention(family, monkeypatch):
    model = make_tiny(family)
    model.set_attn_implementation("eager")
    for module, hidden, keys, values, kwargs, _ in read(model):
        wanted = replay(KVzipPress, module, hidden, keys, values, kwargs)
        monkeypatch.setitem(_known, module, False)
        torch.testing.assert_close(replay(KVzip, module, hidden, keys, values, kwargs), wanted, atol=1e-6, rtol=1e-4)


def test_dropout_makes_no_layer_unknown():
    torch.manual_seed(0)
    model = attach_lora(make_tiny("llama"), 4, 8, ["q_proj"], dropout=0.5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.train()
    assert all_known(model)
    assert all(module.training for module in model.modules())


def test_a_layer_of_another_kind_is_not_known_to_be_wrong():
    """DeepSeek-V2 hands its layers one complex tensor: what a press makes of it shows when it scores."""
    shape = {**SHAPE, "head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v2"](**shape, **heads))
    assert why_not("think", model) is None


def test_running_out_of_memory_is_no_answer(monkeypatch):
    model = make_tiny("llama")
    monkeypatch.setattr(queries, "own_queries", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        all_known(model)
    monkeypatch.undo()
    assert all_known(model)


@pytest.mark.parametrize("press", [SnapKVPress(window_size=8), ExpectedAttentionPress(n_sink=8)])
def test_too_short_a_context_is_named(press):
    model = make_tiny("llama")
    model.set_attn_implementation("eager")
    module, hidden, keys, values, kwargs, _ = next(read(model))
    with pytest.raises(ValueError, match=r"^8 tokens: more than 8 are needed$"):
        without_waiting(press).score(module, hidden[:, :8], keys[:, :, :8], values[:, :, :8], None, kwargs)
