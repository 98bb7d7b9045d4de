"""The masks against their definitions in plain loops, and the fast path against the dense reference."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv import attention, packed_attention
from sparsekv.attention import (
    causal_attention,
    combine_masks,
    dense_attention,
    global_mask,
    kept_indices,
    repeat_heads,
    streaming_mask,
    two_region_attention,
    two_region_mask,
)
from tests.flash import rows_of_different_lengths


def random_keep(batch, heads, cut, count, generator):
    """Bool[batch, heads, cut] with `count` True a head."""
    ranks = torch.rand(batch, heads, cut, generator=generator).argsort(-1).argsort(-1)
    return ranks < count


@st.composite
def evictions(draw, even=True):
    """Shapes, cuts and keep masks of one layer; unless `even`, heads of a row share what they keep."""
    batch, kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = draw(st.integers(2, 24))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), min_size=1, max_size=3)))
    counts = [draw(st.integers(1, cut)) for cut in cuts]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if even:
        keeps = [random_keep(batch, kv_heads, *pair, generator) for pair in zip(cuts, counts, strict=True)]
    else:
        shared = [(kv_heads * cut, kv_heads * count) for cut, count in zip(cuts, counts, strict=True)]
        keeps = [random_keep(batch, 1, *pair, generator).view(batch, kv_heads, -1) for pair in shared]
    return batch, kv_heads, groups, length, cuts, counts, keeps, generator


def loop_mask(batch, heads, length, allowed):
    """Bool[batch, heads, length, length] from a predicate on (row, head, query, key)."""
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for index in itertools.product(range(batch), range(heads), range(length), range(length)):
        mask[index] = bool(allowed(*index))
    return mask


@settings(max_examples=40, deadline=None)
@given(evictions())
def test_two_region_mask_is_its_definition(case):
    batch, heads, _, length, cuts, _, keeps, _ = case

    def allowed(row, head, query, key):
        segment = max((j for j, cut in enumerate(cuts) if query >= cut), default=None)
        if segment is None or key >= cuts[segment]:
            return key <= query
        return keeps[segment][row, head, key]

    assert torch.equal(two_region_mask(keeps, cuts, length), loop_mask(batch, heads, length, allowed))


@settings(max_examples=40, deadline=None)
@given(evictions(), st.integers(0, 30))
def test_global_and_streaming_masks_are_their_definitions(case, recent_size):
    batch, heads, _, length, _, _, _, generator = case
    keep = torch.rand(batch, heads, length, generator=generator) < 0.5

    def seen_globally(row, head, query, key):
        return key <= query and keep[row, head, key]

    def seen_streaming(row, head, query, key):
        return key <= query and (key == query or query - key < recent_size or keep[row, head, key])

    assert torch.equal(global_mask(keep), loop_mask(batch, heads, length, seen_globally))
    assert torch.equal(streaming_mask(keep, recent_size), loop_mask(batch, heads, length, seen_streaming))


def attention_and_gradients(attend, tensors, upstream):
    """Output of `attend(q, k, v)` and the gradients of q, k and v, all as float32."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attend(*leaves)
    return [x.float() for x in (out, *torch.autograd.grad(out, leaves, upstream))]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), scaling=st.sampled_from([None, 0.7]))
def test_fast_path_equals_dense_in_values_and_gradients(data, scaling, dtype, tolerance, even):
    case = data.draw(evictions(even))
    batch, kv_heads, groups, length, cuts, counts, keeps, generator = case
    shapes = [(batch, heads, length, 8) for heads in (kv_heads * groups, kv_heads, kv_heads, kv_heads * groups)]
    *tensors, upstream = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    mask = two_region_mask(keeps, cuts, length)
    fast = attention_and_gradients(
        lambda q, k, v: two_region_attention(q, k, v, keeps, cuts, counts, scaling, even=even), tensors, upstream
    )
    dense = attention_and_gradients(lambda q, k, v: dense_attention(q, k, v, mask, scaling), tensors, upstream)
    for got, wanted in zip(fast, dense, strict=True):
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("even", [True, False])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), scaling=st.sampled_from([None, 0.7]))
def test_pieces_packed_for_one_flash_call_equal_dense(data, scaling, even):
    case = data.draw(evictions(even))
    batch, kv_heads, groups, length, cuts, counts, keeps, generator = case
    tensors = [
        torch.randn(batch, heads, length, 8, generator=generator).requires_grad_()
        for heads in (kv_heads * groups, kv_heads, kv_heads)
    ]
    upstream = torch.randn(tensors[0].shape, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "flash_attention", rows_of_different_lengths)
        packed = attention_and_gradients(
            lambda *qkv: packed_attention.packed_attention(*qkv, keeps, cuts, counts, scaling, even), tensors, upstream
        )
    mask = two_region_mask(keeps, cuts, length)
    dense = attention_and_gradients(lambda *qkv: dense_attention(*qkv, mask, scaling), tensors, upstream)
    for ours, reference in zip(packed, dense, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "dropout", "capability"),
    [
        ({}, 0.0, (8, 0)),
        ({"is_cuda": False}, 0.0, (8, 0)),
        ({"dtype": torch.float32}, 0.0, (8, 0)),
        ({"shape": (1, 2, 3, 20)}, 0.0, (8, 0)),
        ({"shape": (1, 2, 3, 264)}, 0.0, (8, 0)),
        ({}, 0.1, (8, 0)),
        ({}, 0.0, (7, 5)),
    ],
)
def test_what_flash_attention_cannot_take_is_not_packed(changes, dropout, capability, monkeypatch):
    query = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 2, 3, 64), "device": "cuda:0"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    possible = not changes and dropout == 0 and capability == (8, 0)
    assert packed_attention.packs(SimpleNamespace(**query | changes), dropout) == possible


def test_the_fast_path_packs_where_it_can(monkeypatch):
    monkeypatch.setattr(attention, "packs", lambda query, dropout: True)
    monkeypatch.setattr(attention, "packed_attention", lambda *arguments: arguments)
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8)
    keeps = [torch.tensor([[[True, False, True]]])]
    arguments = two_region_attention(query, key, key, keeps, (3,), (2,), 0.7)
    assert arguments[0] is query
    assert arguments[3:] == (keeps, (3,), (2,), 0.7, True)


def test_packed_keys_are_what_each_cut_kept_and_its_own_segment():
    keeps = [torch.tensor([[[True, False, True]]]), torch.tensor([[[False, True, False, False, True]]])]
    index = packed_attention.packed_index(keeps, (3, 5), (2, 2), 6)
    assert index.tolist() == [[[0, 1, 2, *(0, 2, 3, 4), *(1, 4, 5)]]]


def test_dense_attention_is_the_softmax_formula():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (6, 3, 3))
    mask = two_region_mask([random_keep(2, 3, 4, 2, generator)], [4], 7)
    logits = query @ repeat_heads(key, 6).transpose(2, 3) * 0.3
    weights = logits.masked_fill(~repeat_heads(mask, 6), float("-inf")).softmax(-1)
    torch.testing.assert_close(dense_attention(query, key, value, mask, 0.3), weights @ repeat_heads(value, 6))


def test_repeat_heads_gives_neighbouring_query_heads_one_key_head():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert repeat_heads(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert repeat_heads(x, 3) is x


def test_kept_indices_ascend():
    keep = torch.tensor([[[False, True, True, False, True], [True, False, False, True, True]]])
    assert kept_indices(keep, 3).tolist() == [[[1, 2, 4], [0, 3, 4]]]


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (1, 4)])
def test_causal_attention_is_aligned_at_the_last_token(queries, keys):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    mask = loop_mask(2, 2, keys, lambda row, head, q, k: k <= q)[:, :, keys - queries :]
    expected = dense_attention(query, key, value, mask, None)
    torch.testing.assert_close(causal_attention(query, key, value, None, 0.0), expected)


def model_mask(kind, real):
    """The mask a model makes of its padding, Bool[B, 1, L, L] or the same as an additive float mask."""
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    mask = causal & real[:, None, None, :]
    if kind == "boolean":
        return mask
    hidden = float("-inf") if kind == "minus_infinity" else torch.finfo(torch.bfloat16).min
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, hidden)


@pytest.mark.parametrize("kind", ["boolean", "minus_infinity", "lowest_finite"])
def test_combine_masks_takes_boolean_and_additive_masks_alike(kind):
    generator = torch.Generator().manual_seed(0)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    keep = random_keep(3, 2, 6, 3, generator)
    combined = combine_masks(global_mask(keep), model_mask(kind, real))

    def allowed(row, head, query, key):
        return key <= query and keep[row, head, key] and real[row, key]

    expected = loop_mask(3, 2, 6, allowed)
    blind = ~expected.any(-1)
    assert blind.any(), "some query must have nothing to see, or the rule for such queries is not tested"
    assert torch.equal(combined[~blind], expected[~blind])
    row, head, query = blind.nonzero().T
    assert combined[row, head, query, query].all()
    assert (combined[blind].sum(-1) == 1).all()


def test_combine_masks_ignores_the_room_a_static_cache_adds():
    allowed = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril()
    assert torch.equal(combine_masks(allowed, torch.ones(1, 1, 4, 9, dtype=torch.bool)), allowed)
    assert torch.equal(combine_masks(allowed, None), allowed)


def test_a_query_with_nothing_to_see_is_finite_in_values_and_gradients():
    keep = torch.zeros(1, 1, 5, dtype=torch.bool)
    tensors = [torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)]
    mask = combine_masks(global_mask(keep), None)
    out, *gradients = attention_and_gradients(
        lambda q, k, v: dense_attention(q, k, v, mask, None), tensors, torch.ones(1, 2, 5, 4)
    )
    torch.testing.assert_close(out, tensors[2].expand(1, 2, 5, 4))  # each sees itself alone
    assert all(gradient.isfinite().all() for gradient in gradients)
