"""The fast path on a CUDA device: flash calls only, equal to the dense reference."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsekv import attention
from sparsekv.attention import dense_attention, two_region_attention, two_region_mask
from sparsekv.packed_attention import packs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def case(dtype: torch.dtype, rows: int = 2, even: bool = True) -> tuple:
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(rows, 8, 512, 64, generator=generator, device="cuda")
    key, value = (torch.randn(rows, 2, 512, 64, generator=generator, device="cuda") for _ in range(2))
    cuts, counts = (256, 384), (77, 200)
    keeps = []
    for cut, count in zip(cuts, counts, strict=True):
        heads = 2 if even else 1  # or two that share a budget
        scores = torch.rand(rows, heads, 2 // heads * cut, generator=generator, device="cuda")
        top = scores.topk(2 // heads * count).indices
        keeps.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True).view(rows, 2, cut))
    tensors = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    return tensors, keeps, cuts, counts


def gradients(out: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


def test_equal_to_the_dense_reference_in_fp32() -> None:
    tensors, keeps, cuts, counts = case(torch.float32)
    fast = gradients(two_region_attention(*tensors, keeps, cuts, counts, None), tensors)
    dense = gradients(dense_attention(*tensors, two_region_mask(keeps, cuts, 512), None), tensors)
    for ours, reference in zip(fast, dense, strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("packed", "even"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("rows", [1, 2])
def test_flash_alone_serves_bf16_with_shared_heads(
    rows: int, packed: bool, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, keeps, cuts, counts = case(torch.bfloat16, rows, even)
    assert packs(tensors[0], 0.0)
    if not packed:
        monkeypatch.setattr(attention, "packs", lambda *_: False)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # anything else would raise
        fast = gradients(two_region_attention(*tensors, keeps, cuts, counts, None, even=even), tensors)
    exact = [x.detach().float().requires_grad_() for x in tensors]
    dense = gradients(dense_attention(*exact, two_region_mask(keeps, cuts, 512), None), exact)
    for ours, reference in zip(fast, dense, strict=True):
        error = (ours.float() - reference).norm() / reference.norm()
        assert error < 1e-2


@pytest.mark.parametrize("even", [True, False])
def test_the_fast_path_never_waits_for_the_gpu(even: bool) -> None:
    tensors, keeps, cuts, counts = case(torch.bfloat16, even=even)
    two_region_attention(*tensors, keeps, cuts, counts, None, even=even)  # its layout is made once
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        two_region_attention(*tensors, keeps, cuts, counts, None, even=even)
    finally:
        torch.cuda.set_sync_debug_mode(before)
