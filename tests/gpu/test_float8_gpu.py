"""Frozen layers in float8 on a CUDA device: the kernels that a CPU stands in for elsewhere."""

import pytest
import torch
from tiny import make_tiny
from torch import nn

from sparsekv.training.float8 import CAPABILITY, FrozenLinear, float8_weight, use_float8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY,
        reason="needs a CUDA device that computes in float8",
    ),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 77, 2048])
def test_values_and_gradients_are_those_of_float32_but_for_rounding(tokens: int, compiled: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4096, 1024, device="cuda")
    layer = nn.Linear(4096, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer.load_state_dict(plain.state_dict())
    layer.__class__ = FrozenLinear
    layer.float8 = float8_weight(layer.weight)
    x, weights = torch.randn(1, tokens, 4096, device="cuda"), torch.randn(1, tokens, 1024, device="cuda") * 1e-6
    results = []
    for module in (torch.compile(layer, fullgraph=True) if compiled else layer, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=module is not plain):
            output = module(leaf)
        output.backward(weights.to(output.dtype))
        results.append((output.float(), leaf.grad))
    for found, wanted in zip(*results, strict=True):
        assert 0.02 < (found - wanted).norm() / wanted.norm() < 0.06


def test_a_model_is_converted() -> None:
    model = make_tiny("llama").to("cuda", torch.bfloat16).requires_grad_(False)
    use_float8(model)
    assert sum(isinstance(module, FrozenLinear) for module in model.modules()) == 14
    assert model(input_ids=torch.arange(5, 69, device="cuda")[None]).logits.isfinite().all()
