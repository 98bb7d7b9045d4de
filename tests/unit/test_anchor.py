"""Anchors against a plain loop, and the budget of keep masks against counting."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.utils import compute_n_kept
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparsekv import tokens
from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import UserError
from sparsekv.training import anchor
from sparsekv.training.anchor import build_kv_mask_from_anchors, kept_count

VOCAB = ["<eos>", "<unk>", ",", ".", "the", "cat", "dog", "\n", "7"]
EOS, COMMA, CAT, NEWLINE = 0, 2, 5, 7
STATIC = {0, 1, 2, 3}  # special and punctuation


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "cache_folder", lambda: folder)
        backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCAB)}, unk_token="<unk>"))
        yield PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@st.composite
def batches(draw):
    """Token ids [B, L] with a mask of real tokens: left-padded, right-padded or with holes."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    ids = draw(st.lists(st.lists(st.integers(0, 8), min_size=length, max_size=length), min_size=rows, max_size=rows))
    kind = draw(st.sampled_from(["none", "left", "right", "holes"]))
    mask = []
    for _ in range(rows):
        n = draw(st.integers(0, length)) if kind != "none" else length
        left, right = [0] * (length - n) + [1] * n, [1] * n + [0] * (length - n)
        mask.append({"left": left, "holes": draw(st.permutations(left))}.get(kind, right))
    return torch.tensor(ids), torch.tensor(mask)


configs = st.builds(
    AnchorConfig, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 5), st.integers(0, 30)
)


def anchors_by_loop(config, ids, mask, cut):
    """What `AnchorSelector` promises, one token at a time."""
    out = torch.zeros(ids.shape, dtype=torch.bool)
    for row in range(len(ids)):
        context = [i for i in range(cut) if mask[row, i]]
        for order, i in enumerate(context):
            token = int(ids[row, i])
            out[row, i] = (
                (config.use_special and token in {0, 1})
                or (config.use_punctuation and token in {2, 3})
                or (config.use_sink and order < config.sink_size)
                or (config.use_recent and len(context) - order <= config.recent_size)
            )
    return out


# ---- which tokens are anchors


@settings(deadline=None)
@given(batch=batches(), config=configs, data=st.data())
def test_selector_equals_the_loop(tokenizer, batch, config, data):
    ids, mask = batch
    cut = data.draw(st.integers(0, ids.shape[1]))
    selector = AnchorSelector(config, tokenizer)
    expected = anchors_by_loop(config, ids, mask, cut)
    assert torch.equal(selector(ids, mask, cut), expected)
    assert torch.equal(selector(ids, mask.bool(), cut), expected)


def test_without_mask_and_cut_the_context_is_everything(tokenizer):
    ids = torch.randint(0, 9, (3, 20), generator=torch.Generator().manual_seed(0))
    config = AnchorConfig(recent_size=5)
    expected = anchors_by_loop(config, ids, torch.ones_like(ids), 20)
    assert torch.equal(AnchorSelector(config, tokenizer)(ids), expected)


def test_padding_with_the_end_token_is_no_anchor_but_a_real_end_token_is(tokenizer):
    """Left, right and no padding mark the same real tokens, although the padding looks like a special token."""
    selector = AnchorSelector(AnchorConfig(sink_size=1, recent_size=2), tokenizer)
    row = [CAT, CAT, EOS, CAT, COMMA, CAT, CAT, CAT]
    alone = selector(torch.tensor([row]))[0]
    assert alone.tolist() == [True, False, True, False, True, False, True, True]
    pad, off = [EOS] * 5, [0] * 5
    both = selector(torch.tensor([pad + row, row + pad]), torch.tensor([off + [1] * 8, [1] * 8 + off]))
    assert torch.equal(both[0], torch.cat([torch.zeros(5, dtype=torch.bool), alone]))
    assert torch.equal(both[1], torch.cat([alone, torch.zeros(5, dtype=torch.bool)]))


def test_recent_counts_back_from_the_cut(tokenizer):
    selector = AnchorSelector(AnchorConfig(sink_size=0, recent_size=3), tokenizer)
    anchors = selector(torch.full((1, 20), CAT), cut=10)
    assert anchors[0].nonzero()[:, 0].tolist() == [7, 8, 9]


def test_classes_are_the_static_anchors_of_any_shape(tokenizer):
    ids = torch.arange(9).reshape(3, 3)
    selector = AnchorSelector(AnchorConfig(), tokenizer)
    assert set(ids[selector.classes(ids)].tolist()) == STATIC
    newline = AnchorSelector(AnchorConfig(extra_punctuation="\n"), tokenizer)
    assert set(ids[newline.classes(ids)].tolist()) == STATIC | {NEWLINE}


def test_anchors_live_on_the_device_of_the_ids(tokenizer):
    selector = AnchorSelector(AnchorConfig(), tokenizer)
    assert selector(torch.zeros(2, 8, dtype=torch.long, device="meta")).device.type == "meta"
    assert selector(torch.zeros(2, 8, dtype=torch.long)).device.type == "cpu"


def test_wrong_shapes_and_cuts_are_refused(tokenizer):
    selector, ids = AnchorSelector(AnchorConfig(), tokenizer), torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(2, 8\)"):
        selector(ids, torch.ones(2, 7))
    with pytest.raises(ValueError, match="cut 9"):
        selector(ids, cut=9)
    with pytest.raises(ValueError, match="batch, length"):
        selector(ids[0])


@pytest.mark.parametrize("name", ["sink_size", "recent_size"])
@pytest.mark.parametrize("value", [-1, 2.5])
def test_sizes_are_checked_and_named(name, value):
    with pytest.raises(UserError, match=f"--anchors.{name} {value}"):
        AnchorConfig(**{name: value})


# ---- the budget


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_kept_count_is_kvpress_rounding(ratio):
    lengths = range(1, 5000)
    assert [kept_count(n, ratio) for n in lengths] == [compute_n_kept(n, 1 - ratio) for n in lengths]


@settings(deadline=None)
@given(st.integers(1, 200_000), st.floats(1e-6, 1.0))
def test_kept_count_is_kvpress_rounding_for_any_ratio(length, ratio):
    assert kept_count(length, ratio) == compute_n_kept(length, 1 - ratio)


@settings(deadline=None)
@given(batch=batches(), ratio=st.floats(0.01, 1.0), heads=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_budget_is_met_exactly_with_all_anchors_and_no_padding(batch, ratio, heads, seed, data):
    ids, mask = batch
    anchors = ids <= data.draw(st.integers(-1, 3))
    keep = build_kv_mask_from_anchors(anchors, ratio, heads, torch.Generator().manual_seed(seed), mask)
    assert keep.dtype == torch.bool
    assert keep.shape == (ids.shape[0], heads, ids.shape[1])
    real = mask.bool()
    assert not (keep & ~real[:, None]).any()
    assert (keep | ~(anchors & real)[:, None]).all()
    for row in range(len(ids)):
        num_real, num_anchors = int(real[row].sum()), int((anchors & real)[row].sum())
        budget = min(num_real, max(kept_count(num_real, ratio), num_anchors))
        assert keep[row].sum(-1).tolist() == [budget] * heads


def test_equal_draws_do_not_exceed_the_budget():
    keep = build_kv_mask_from_anchors(torch.zeros(2, 40, dtype=torch.bool), 0.3, 4, torch.full((2, 4, 40), 0.5))
    assert (keep.sum(-1) == kept_count(40, 0.3)).all()


def test_the_sample_is_uniform_and_independent_per_head():
    anchors = torch.zeros(1, 20, dtype=torch.bool)
    anchors[0, :4] = True
    keep = build_kv_mask_from_anchors(anchors, 0.6, 20_000, torch.Generator().manual_seed(0))[0].double()
    assert (keep[:, :4] == 1).all()
    share = keep[:, 4:].mean(0)  # 8 of 16, standard error 0.0035
    torch.testing.assert_close(share, torch.full_like(share, 0.5), atol=0.02, rtol=0)
    neighbours = (keep[:-1, 4:] * keep[1:, 4:]).mean()  # heads that shared a draw would give 0.5
    torch.testing.assert_close(neighbours, torch.tensor(0.25).double(), atol=0.01, rtol=0)


def test_the_generator_decides_the_draw():
    anchors = torch.zeros(2, 50, dtype=torch.bool)

    def draw(seed):
        return build_kv_mask_from_anchors(anchors, 0.5, 3, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@settings(deadline=None)
@given(seed=st.integers(0, 99), ratio=st.floats(0.05, 1.0), left=st.booleans())
def test_with_a_draw_of_its_own_batching_and_padding_change_nothing(seed, ratio, left):
    """1 × 8 equals 8 × 1: the same rows alone and unpadded, or together and padded to the longest."""
    lengths = torch.randint(1, 30, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [torch.rand(n, generator=torch.Generator().manual_seed(seed + n)) < 0.2 for n in lengths]
    total = max(lengths) + 3
    draws = torch.rand(8, 2, total, generator=torch.Generator().manual_seed(seed))
    slots = [slice(total - n, total) if left else slice(0, n) for n in lengths]
    anchors, mask = torch.ones(8, total, dtype=torch.bool), torch.zeros(8, total, dtype=torch.long)
    for i, slot in enumerate(slots):
        anchors[i, slot], mask[i, slot] = rows[i], 1
    together = build_kv_mask_from_anchors(anchors, ratio, 2, draws, mask)
    for i, row in enumerate(rows):
        alone = build_kv_mask_from_anchors(row[None], ratio, 2, draws[i : i + 1, :, : len(row)])
        assert torch.equal(together[i, :, slots[i]], alone[0])


def test_too_many_anchors_are_kept_and_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(anchor, "_overflow_reported", False)
    anchors = torch.zeros(2, 100, dtype=torch.bool)
    anchors[1, :62] = True
    with caplog.at_level(logging.WARNING):
        build_kv_mask_from_anchors(anchors, 0.7, 2)
        assert caplog.records == []
        for _ in range(3):
            keep = build_kv_mask_from_anchors(anchors, 0.5, 2)
    assert torch.equal(keep[1], anchors[1].expand(2, -1))
    assert keep[0].sum(-1).tolist() == [50, 50]
    (record,) = caplog.records
    assert "keep ratio 0.5 of 100 tokens allows 50, but 62 are anchors (62.0%)" in record.getMessage()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_keep_ratio_is_checked(ratio):
    with pytest.raises(UserError, match=r"keep ratio .* \(0, 1\]"):
        build_kv_mask_from_anchors(torch.zeros(1, 4, dtype=torch.bool), ratio, 1)


def test_a_draw_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"draw of \(2, 1, 4\) for rows, heads and tokens \(3, 1, 4\)"):
        build_kv_mask_from_anchors(torch.zeros(3, 4, dtype=torch.bool), 0.5, 1, torch.rand(2, 1, 4))
