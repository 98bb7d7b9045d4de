"""The kernel against the reference: on a GPU, or on a CPU by Triton's interpreter, in a process of its own."""

import pytest
import torch
from kernels import DEVICE, check_interpreted, runs

from sparsekv.observe import causal_probabilities


def test_by_the_interpreter():
    check_interpreted(__file__)


@runs
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("cuts", [(1,), (100, 101, 150), (64, 128), (198,)])
def test_the_kernel_is_the_reference(width, heads, shared, cuts):
    from sparsekv.training.later_kernel import most_attention

    torch.manual_seed(0)
    length = 199
    query = torch.randn(2, length, heads, width, device=DEVICE).half().transpose(1, 2)  # as models have them
    key = torch.randn(2, length, shared, width, device=DEVICE).half().transpose(1, 2)
    ((_, probabilities),) = causal_probabilities(query, key, 0.3, block=length)
    found = most_attention(query, key, 0.3, cuts)
    for start, stop, got in zip(cuts, [*cuts[1:], length], found, strict=True):
        assert got.shape == (2, heads, start)
        torch.testing.assert_close(got, probabilities[:, :, start:stop, :start].amax(2), atol=1e-5, rtol=1e-3)
