"""Modules are switched and switched back, and peft's own switch means the same."""

import pytest
import torch
from tiny import make_tiny

from sparsekv.adapters import attach_lora
from sparsekv.modes import ADAPTER_SWITCH, switched, training_already


@pytest.fixture
def model():
    torch.manual_seed(0)
    adapted = attach_lora(make_tiny("llama"), 4, 8, ["q_proj", "v_proj", "up_proj"])
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return adapted


def test_only_what_differs_is_switched_and_comes_back_after_an_error(model):
    modules = list(model.modules())
    model.train()
    modules[7].training = False
    before = [module.training for module in modules]
    with switched(modules, "training", False):
        assert not any(module.training for module in modules)
    assert [module.training for module in modules] == before
    with pytest.raises(KeyError), switched(modules, "training", False):
        raise KeyError
    assert [module.training for module in modules] == before
    assert before.count(False) == 1


def test_adapters_off_is_what_peft_calls_off(model):
    ids = torch.arange(5, 30)[None]
    adapters = [module for module in model.modules() if hasattr(module, ADAPTER_SWITCH)]
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        with switched(adapters, ADAPTER_SWITCH, True):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, adapted)
    assert not torch.allclose(base, adapted)
    assert any(weight.requires_grad for weight in model.parameters())


def test_a_model_that_trains_is_not_walked_through_again(model):
    base = model.get_base_model()
    with training_already(model.eval(), base):
        assert all(module.training for module in model.train().modules())
    with training_already(model.train(), base.eval()):  # as an adapter is attached
        assert all(module.training for module in model.train().modules())
    part = next(base.children())
    with training_already(model, base):
        part.eval()
        assert model.train() is model
        assert not part.training
        assert not model.eval().training
        model.training = True
    assert model.train() is model
    assert part.training
