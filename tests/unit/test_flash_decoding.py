"""The kernel against the reference: on a GPU, or on a CPU by Triton's interpreter, in a process of its own."""

import pytest
import torch
from kernels import DEVICE, check_interpreted, runs


def test_by_the_interpreter():
    check_interpreted(__file__)


@runs
@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (8, 2), (20, 1)])
@pytest.mark.parametrize("counts", [[1, 1], [300, 7], [64, 301]])
def test_the_kernel_is_the_reference(dim, heads, shared, counts):
    from sparsekv.inference.flash_decoding import flash_decoding
    from sparsekv.inference.static_attention import attend_masked

    torch.manual_seed(0)
    size, count = 301, torch.tensor(counts, device=DEVICE)
    query = 3 * torch.randn(2, 1, heads, dim, device=DEVICE).transpose(1, 2)
    keys, values = torch.randn(2, 2, shared, size, dim, device=DEVICE)
    mask = (torch.arange(size, device=DEVICE) < count[:, None])[:, None, None]
    wanted = attend_masked(query.double(), keys.double(), values.double(), mask, 0.3)
    unread = ~mask.transpose(2, 3)  # slots that are not filled are not read
    found = flash_decoding(
        query, keys.masked_fill(unread, torch.nan), values.masked_fill(unread, torch.nan), count, 0.3
    )
    assert (found - wanted).abs().max() < 5e-5
