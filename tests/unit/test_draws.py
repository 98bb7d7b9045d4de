"""Draws by place: uniform, independent, and the same whatever the batch."""

import pytest
import torch

from sparsekv.training.draws import _mix, row_streams, uniform_draws

SEEDS = torch.tensor([0, 1, 2**24, 2**48 - 1, 123_456_789_012])
HEADS, LENGTH = 3, 2000


def draws(layer=0, length=LENGTH, seeds=SEEDS, cut=None):
    return uniform_draws(row_streams(seeds, layer, LENGTH if cut is None else cut), HEADS, length)


def test_a_draw_depends_on_its_own_place_only():
    together = draws()
    assert together.dtype == torch.float32
    for row in range(len(SEEDS)):
        assert torch.equal(draws(seeds=SEEDS[row : row + 1])[0], together[row])
    assert torch.equal(draws(length=50, cut=LENGTH), together[..., :50])
    assert torch.equal(draws(cut=torch.full((len(SEEDS),), LENGTH)), together)


def test_rows_layers_cuts_and_heads_draw_independently():
    every = torch.stack([draws(layer, cut=cut) for layer in (0, 1, 29) for cut in (LENGTH, LENGTH - 1)])
    series = every.flatten(0, -2)  # [layers × cuts × rows × heads, L]
    correlation = torch.corrcoef(series.double()) - torch.eye(len(series))
    assert correlation.abs().max() < 5 / LENGTH**0.5
    neighbours = torch.corrcoef(torch.stack([series[:, :-1].flatten(), series[:, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.01


def test_streams_of_all_layers_are_those_of_each():
    every = row_streams(SEEDS, torch.arange(5)[:, None], LENGTH)
    assert torch.equal(every, torch.stack([row_streams(SEEDS, layer, LENGTH) for layer in range(5)]))


def test_draws_are_uniform():
    values = draws().flatten().sort().values.double()
    assert values[0] >= 0
    assert values[-1] < 1
    even = (torch.arange(len(values)) + 0.5) / len(values)
    assert (values - even).abs().max() < 1.63 / len(values) ** 0.5  # Kolmogorov and Smirnov, 1%


def test_the_hash_is_the_published_one_and_ints_equal_tensors():
    def by_uint32(x):
        x = (x ^ x >> 15) * 0x2C1B3C6D % 2**32
        x = (x ^ x >> 12) * 0x297A2D39 % 2**32
        return x ^ x >> 15

    numbers = [0, 1, 2, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]
    assert _mix(torch.tensor(numbers)).tolist() == [_mix(x) for x in numbers] == [by_uint32(x) for x in numbers]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same():
    assert torch.equal(draws(seeds=SEEDS.cuda()).cpu(), draws())
