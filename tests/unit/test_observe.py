"""The observer hands over what the model attends with, changes nothing, and refuses what it cannot read."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    ModernBertDecoderConfig,
)

from sparsekv import observe
from sparsekv.errors import UserError
from sparsekv.observe import causal_probabilities, check_observable, observing, received_attention
from tests.tiny import SHAPE, make_sharp, make_tiny

LENGTH = 45


def text(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(5, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def capture(model: torch.nn.Module, ids: Tensor) -> dict[int, tuple]:
    captured = {}
    with torch.no_grad(), observing(model, lambda layer, *rest: captured.update({layer: rest})):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return captured


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("block", [1, 7, LENGTH, None])
def test_probabilities_are_those_of_output_attentions(name: str, block: int | None) -> None:
    model, ids = make_sharp(name), text(batch=2)
    captured = capture(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert list(captured) == [0, 1]
    for layer, (query, key, _, scaling) in captured.items():
        wanted, position = attentions[layer], 0
        assert wanted.max(-1).values[:, :, LENGTH // 2 :].mean() > 0.3  # not even
        for start, probabilities in causal_probabilities(query, key, scaling, block):
            assert start == position
            position = start + probabilities.shape[2]
            assert probabilities.shape == (2, 4, position - start, position)
            torch.testing.assert_close(probabilities, wanted[:, :, start:position, :position], atol=1e-5, rtol=0)
        assert position == LENGTH


def test_captured_values_are_those_of_the_cache() -> None:
    model, ids = make_sharp("qwen3"), text()
    captured = capture(model, ids)
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    for layer, (_, key, value, _) in captured.items():
        torch.testing.assert_close(key, layers[layer].keys)
        torch.testing.assert_close(value, layers[layer].values)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_attends_as_usual_and_is_left_as_it_was(adapted: bool) -> None:
    model, ids = make_tiny("llama"), text(batch=2)
    if adapted:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    reports = []
    with torch.no_grad():
        plain = model(ids).logits
        with observing(model, lambda layer, *_: reports.append(layer)):
            assert torch.equal(model(ids).logits, plain)
        with pytest.raises(KeyError), observing(model, lambda *_: None):
            raise KeyError
        assert torch.equal(model(ids).logits, plain)
    assert reports == [0, 1]
    assert model.config._attn_implementation == "sdpa"
    assert not model.get_decoder()._forward_pre_hooks


def test_the_inner_observer_receives() -> None:
    model, outer, inner = make_tiny("llama"), [], []
    with torch.no_grad(), observing(model, lambda layer, *_: outer.append(layer)):
        with observing(model, lambda layer, *_: inner.append(layer)):
            model(text())
        assert (outer, inner) == ([], [0, 1])
        model(text())
    assert (outer, inner) == ([0, 1], [0, 1])


def test_padding_is_refused() -> None:
    model, ids = make_tiny("llama"), text(batch=2)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with torch.no_grad(), observing(model, lambda *_: None), pytest.raises(ValueError, match="mask of its own"):
        model(ids, attention_mask=padded)


def test_a_bias_by_position_is_refused() -> None:
    """Which newer versions of transformers hand over beside the mask."""
    model, ids = make_tiny("llama"), text()
    with torch.no_grad(), observing(model, lambda *_: None), pytest.raises(ValueError, match="bias by position"):
        model.get_decoder()(input_ids=ids, use_cache=False, position_bias=torch.zeros(1, 4, LENGTH, LENGTH))


def test_no_block_outgrows_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(observe.BLOCK_ELEMENTS, "cpu", 4 * 600 * 20)
    for length, rows in ((600, 20), (1200, 10), (2400, observe.MIN_BLOCK)):
        query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
        sizes = [probabilities.shape[2] for _, probabilities in causal_probabilities(query, key, 0.3)]
        assert max(sizes) == rows
        assert sum(sizes) == length


@pytest.mark.parametrize("length", [1, 2, 77])
def test_even_attention_is_received_evenly(length: int) -> None:
    query, key = torch.zeros(1, 4, length, 8), torch.randn(1, 2, length, 8)
    torch.testing.assert_close(received_attention(query, key, 1.0), torch.ones(1, 4, length))


def test_received_attention_is_divided_by_exposure() -> None:
    model = make_sharp("llama")
    query, key, _, scaling = capture(model, text())[1]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(text(), output_attentions=True).attentions[1]
    expected = [sum(1 / (q + 1) for q in range(k, LENGTH)) for k in range(LENGTH)]
    wanted = attention.sum(2) / torch.tensor(expected)
    torch.testing.assert_close(received_attention(query, key, scaling), wanted, atol=1e-5, rtol=1e-5)


def test_logits_of_bfloat16_are_made_in_float32() -> None:
    query, key = torch.randn(1, 4, 60, 16).bfloat16(), torch.randn(1, 2, 60, 16).bfloat16()
    wanted = received_attention(query.float(), key.float(), 2.0)
    assert torch.equal(received_attention(query, key, 2.0), wanted)
    with torch.autocast("cpu", torch.bfloat16):  # as in training on a GPU
        assert torch.equal(received_attention(query, key, 2.0), wanted)


def test_fewer_queries_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="as many keys as queries"):
        list(causal_probabilities(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), 1.0))


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "mistral"])
def test_plain_models_are_observable(name: str) -> None:
    check_observable(make_tiny(name), name, 2048)


def test_a_window_matters_only_where_it_is_shorter_than_the_text() -> None:
    model = make_tiny("gemma3")
    check_observable(model, "gemma3", 7)
    with pytest.raises(UserError, match=r"--model gemma3: has layers that see 8 tokens at most.*over 8"):
        check_observable(model, "gemma3", 8)
    capture(model, text(length=7))
    with pytest.raises(ValueError, match="mask of its own"):  # where the bound is, transformers says
        capture(model, text(length=8))


SMALL = {**SHAPE, "layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SMALL), "soft cap"),
        (BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "looks ahead"),
        (GptOssConfig(**SMALL, num_local_experts=2), "not SDPA"),
        (Lfm2Config(**{**SHAPE, "layer_types": ["conv", "full_attention"]}), "layers without attention.*: 0$"),
        (FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "attention interface"),
        (ModernBertDecoderConfig(**SHAPE), ""),
    ],
)
def test_models_that_cannot_be_captured_are_one_line(config, reason: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=f"--model their/model: .*{reason}") as caught:
        check_observable(model, "their/model", 32)
    assert "\n" not in str(caught.value)
