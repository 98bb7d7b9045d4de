"""An attention function of ours in a model: told to every layer, with masks where rows need them, and taken back."""

import copy

import pytest
import torch
from tiny import make_tiny
from transformers import AutoModelForCausalLM, FalconConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsekv.attention_interface import attending_by

IDS = torch.arange(5, 29).view(2, 12)
PADDED = torch.ones_like(IDS).index_fill_(1, torch.arange(3), 0)
PACKED = torch.arange(12).remainder(5)[None]  # three rows in one
NAME = "test_attention_interface"


def run(name: str, **inputs) -> list[bool]:
    """Whether each layer got a mask; the logits are those of the model by itself."""
    model, masked = make_tiny(name), []

    def attend(module, query, key, value, attention_mask, **kwargs):
        masked.append(attention_mask is not None)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    with torch.no_grad():
        wanted = model(IDS, use_cache=False, **inputs).logits
        with attending_by(model, NAME, attend):
            found = model(IDS, use_cache=False, **inputs).logits
    assert torch.equal(found, wanted)
    return masked


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_layers_get_the_masks_of_sdpa(name: str) -> None:
    assert run(name) == [False, False]
    assert run(name, attention_mask=torch.ones_like(IDS)) == [False, False]
    assert run(name, attention_mask=PADDED) == [True, True]
    assert run(name, position_ids=PACKED) == [True, True]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_mask_by_position_and_a_cache_count_as_well(name: str) -> None:
    def hidden(decoder) -> list[torch.Tensor]:
        masked = decoder(IDS, PADDED, use_cache=False).last_hidden_state
        first = decoder(IDS[:, :7], use_cache=True)
        rest = decoder(IDS[:, 7:], past_key_values=first.past_key_values).last_hidden_state
        return [masked, first.last_hidden_state, rest]

    model = make_tiny(name)
    with torch.no_grad():
        wanted = hidden(model.model)
        with attending_by(model, NAME, sdpa_attention_forward):
            found = hidden(model.model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_a_model_that_attends_by_itself_is_left_as_it_is() -> None:
    config = FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        wanted = model(IDS).logits
        with attending_by(model, NAME, sdpa_attention_forward):
            assert torch.equal(model(IDS).logits, wanted)


def test_masks_that_are_made_outside_of_the_decoder_are_made() -> None:
    """As `generate` makes them for a static cache, before the decoder runs."""
    model = make_tiny("llama")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    options |= {"attention_mask": PADDED, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        wanted = model.generate(IDS, **options)
        with attending_by(model, NAME, sdpa_attention_forward):
            model(IDS, use_cache=False)
            assert model.config._attn_implementation == NAME
            found = model.generate(IDS, **options)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_window_shorter_than_the_row_is_a_mask() -> None:
    assert True in run("gemma3")


def test_no_positions_are_looked_at_where_attention_is_plain_causal(monkeypatch) -> None:
    def refuse(position_ids):
        raise AssertionError("this would wait for the GPU")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", refuse)
    model = make_tiny("llama")
    with attending_by(model, NAME, sdpa_attention_forward):
        model(IDS, use_cache=False)
        with pytest.raises(AssertionError, match="wait"):
            model(IDS, use_cache=False, position_ids=PACKED)


def test_every_layer_is_told_and_the_inner_context_decides() -> None:
    model = make_tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)  # a layer with a configuration of its own
    called = []

    def attend(kind: str):
        def function(*args, **kwargs):
            called.append(kind)
            return sdpa_attention_forward(*args, **kwargs)

        return function

    with attending_by(model, "outer", attend("outer")):
        with attending_by(model, "inner", attend("inner")):
            model(IDS)
        with pytest.raises(KeyError), attending_by(model, "inner", attend("inner")):
            raise KeyError
        model(IDS)
    model(IDS)
    assert called == ["inner"] * 2 + ["outer"] * 2
    assert {config._attn_implementation for config in (model.config, attention.config)} == {"sdpa"}
    assert not model.get_decoder()._forward_pre_hooks
