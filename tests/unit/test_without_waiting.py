"""The same scores as kvpress's own presses, and nothing read back from the device."""

import inspect

import pytest
import torch
from kvpress import CriticalKVPress, ExpectedAttentionPress, KnormPress, SnapKVPress, TOVAPress
from tiny import make_tiny

from sparsekv.presses import kvpress_knows, without_waiting

PRESSES = {
    "snapkv": lambda: SnapKVPress(0.4, window_size=16, kernel_size=3),
    "tova": lambda: TOVAPress(0.4),
    "expected_attention": lambda: ExpectedAttentionPress(0.4),
    "expected_attention, its options": lambda: ExpectedAttentionPress(
        0.4, n_future_positions=64, n_sink=2, use_vnorm=False, epsilon=1e-2
    ),
    "expected_attention without covariance": lambda: ExpectedAttentionPress(0.4, use_covariance=False, epsilon=1e-2),
    "critical_snapkv": lambda: CriticalKVPress(SnapKVPress(0.4)),
}


@pytest.fixture(params=["llama", "qwen3"])
def layer(request):
    """An attention layer, and what kvpress hands to a press's `score` there: two rows of 200 tokens."""
    model = make_tiny(request.param).eval()
    module, config = model.model.layers[1].self_attn, model.config
    module.rotary_emb = model.model.rotary_emb
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 200, config.hidden_size, generator=generator)
    keys, values = (
        torch.randn(2, config.num_key_value_heads, 200, module.head_dim, generator=generator) for _ in range(2)
    )
    rotary = model.model.rotary_emb(hidden, torch.arange(200)[None])
    return module, (hidden, keys, values), {"position_embeddings": rotary}


@pytest.mark.parametrize("name", PRESSES)
def test_scores_and_their_gradients_are_those_of_kvpress(name, layer):
    module, tensors, kwargs = layer
    found = []
    for press in (PRESSES[name](), without_waiting(PRESSES[name]())):
        leaves = [x.clone().requires_grad_() for x in tensors]
        scores = press.score(module, *leaves, None, kwargs)
        weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
        free = scores < scores.amax()  # the others are pinned
        gradients = torch.autograd.grad((scores * weights)[free].sum(), leaves, allow_unused=True)
        found.append([scores, *gradients])
    for ours, theirs in zip(*reversed(found), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_an_average_rotation_is_made_once_for_all_layers_of_a_length(layer, monkeypatch):
    module, (hidden, keys, values), kwargs = layer
    press = without_waiting(ExpectedAttentionPress(0.4))
    made = []
    rotary = module.rotary_emb.forward
    monkeypatch.setattr(module.rotary_emb, "forward", lambda *args: made.append(1) or rotary(*args))
    for length in (200, 200, 150, 200):
        press.score(module, hidden[:, :length], keys[:, :, :length], values[:, :, :length], None, kwargs)
    assert len(made) == 2


@pytest.mark.parametrize("name", [name for name in PRESSES if name != "critical_snapkv"])
def test_nothing_is_read_back_from_the_device(name, layer, monkeypatch):
    """On the meta device, where a number cannot be read; what kind of layer it is has been found out before."""
    module, tensors, kwargs = layer
    assert kvpress_knows(module, tensors[0], kwargs["position_embeddings"])
    module.to("meta")
    turned = lambda x, positions: (x.new_empty(*positions.shape, module.head_dim),) * 2  # noqa: E731
    monkeypatch.setattr(module.rotary_emb, "forward", turned)
    tensors = [x.to("meta") for x in tensors]
    kwargs = {"position_embeddings": tuple(x.to("meta") for x in kwargs["position_embeddings"])}
    with pytest.raises((RuntimeError, NotImplementedError)):
        PRESSES[name]().score(module, *tensors, None, kwargs)  # .item()
    assert without_waiting(PRESSES[name]()).score(module, *tensors, None, kwargs).shape == tensors[1].shape[:3]


def test_other_presses_stay_what_they_are():
    press = KnormPress(0.5)
    assert without_waiting(press) is press


def test_a_press_inside_another_is_replaced_and_the_given_one_stays():
    given = CriticalKVPress(SnapKVPress(0.5, window_size=8))
    made = without_waiting(given)
    assert type(given.press) is SnapKVPress
    assert made.press.window_size == 8
    assert made.compression_ratio == 0.5
    assert inspect.getmodule(type(made.press)).__name__.startswith("sparsekv")
