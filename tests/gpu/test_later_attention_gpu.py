"""What later queries attend to on a CUDA device: the kernels equal the blocks of probabilities."""

import pytest
import torch

from sparsekv.training.selection import _has_kernel, later_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICES = [0, pytest.param(1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("cuts", [(301,), (64, 200, 511)])
def test_bfloat16_equals_the_cpu(device: int, width: int, cuts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 640, width, generator=generator).bfloat16() for heads in (6, 2))
    on_gpu = query.to(f"cuda:{device}"), key.to(f"cuda:{device}")
    assert _has_kernel(on_gpu[0].device, torch.bfloat16, width)
    wanted = later_attention(query, key, width**-0.5, cuts)
    for theirs, ours in zip(wanted, later_attention(*on_gpu, width**-0.5, cuts), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-5, rtol=1e-3)


def test_every_layout_is_read() -> None:
    query, key = (torch.randn(1, heads, 64, 200, device="cuda").bfloat16().transpose(2, 3) for heads in (2, 1))
    (found,) = later_attention(query, key, 0.1, (77,))
    (wanted,) = later_attention(query.contiguous(), key.contiguous(), 0.1, (77,))
    torch.testing.assert_close(found, wanted)
