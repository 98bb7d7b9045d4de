"""The selection loss: what later queries attend to, and a loss that only the ranking of scores moves."""

import pytest
import torch

from sparsekv.presses import make_press
from sparsekv.training.eviction import ForwardEviction, _loss_at_cut
from sparsekv.training.plan import EvictionPlan
from sparsekv.training.rules import Kept, SharedBudgetRule
from sparsekv.training.selection import later_attention, selection_loss

CUTS = (5, 11, 16)
LENGTH = 23


@pytest.mark.parametrize("cuts", [(7,), CUTS])
def test_later_attention_is_the_maximum_over_later_queries(cuts):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, LENGTH, 8, generator=generator) for heads in (4, 2))
    logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.7
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    probabilities = logits.masked_fill(~causal, -torch.inf).softmax(-1).view(2, 2, 2, LENGTH, LENGTH)
    for cut, got in zip(cuts, later_attention(query, key, 0.7, cuts), strict=True):
        torch.testing.assert_close(got, probabilities[..., cut:, :cut].amax((2, 3)))


@pytest.fixture
def scores():
    return torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def importance():
    return torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(2)) ** 4


def test_shifting_and_scaling_a_heads_scores_changes_nothing(scores, importance):
    """Where some are negative: otherwise it is their logarithm that may be shifted."""
    loss = selection_loss(scores, 8, importance)
    moved = scores * torch.tensor([0.01, 1.0, 50.0])[:, None] + torch.tensor([0.001, -2.0, 7.0])[:, None]
    torch.testing.assert_close(selection_loss(moved, 8, importance), loss, rtol=1e-4, atol=1e-5)


def test_raising_every_score_gains_nothing(scores, importance):
    selection_loss(scores, 8, importance).sum().backward()
    torch.testing.assert_close(scores.grad.sum(-1), torch.zeros(2, 3), rtol=0, atol=1e-5)


def test_an_entry_counts_by_the_cube_of_what_it_is_attended_to(importance):
    scores = torch.linspace(1, 0, importance.shape[-1]).expand_as(importance).clone()
    scores[..., 12:16] = 0.1  # evicted, alike
    scores.requires_grad_()
    for place, attended in enumerate((0.0, 0.1, 0.2, 0.4), start=12):
        importance[..., place] = attended
    selection_loss(scores, 8, importance).sum().backward()
    pulled = (scores.grad[..., 12, None] - scores.grad[..., 13:16])[0, 0]
    torch.testing.assert_close(pulled / pulled[0], torch.tensor([1.0, 8.0, 64.0]), rtol=1e-3, atol=0)


def test_descent_lets_what_is_attended_to_survive(scores, importance):
    """Plain gradient descent on the scores alone: the share of the attention on kept entries grows to the most."""

    def kept_share(scores):
        kept = torch.zeros_like(importance).scatter_(-1, scores.topk(8, dim=-1).indices, 1.0)
        return float((importance * kept).sum() / importance.sum())

    most, before = kept_share(importance), kept_share(scores)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        selection_loss(scores, 8, importance).sum().backward()
        optimizer.step()
    assert before < 0.8 * most
    assert kept_share(scores) > 0.97 * most


def test_a_row_weighs_its_heads_by_what_they_attend_to(scores, importance):
    """A head to which no later query attends adds nothing, and rows do not mix."""
    silent = importance.clone()
    silent[:, 1] = 0
    together = selection_loss(scores, 8, silent)
    without = selection_loss(scores[:, [0, 2]], 8, silent[:, [0, 2]])
    torch.testing.assert_close(together, without)
    torch.testing.assert_close(selection_loss(scores[:1], 8, silent[:1]), together[:1])


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_equal_scores_give_no_gradient(importance, value):
    flat = torch.full((2, 3, 20), value, requires_grad=True)
    loss = selection_loss(flat, 8, importance)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert not flat.grad.any()


@pytest.mark.parametrize("tail", [-1.0, -1e-3, -1e4])
def test_ties_at_the_border_blow_no_gradient_up(tail):
    """As scores in bfloat16 have them: the median of the evicted lies at the border, another far below."""
    scores = torch.tensor([9.0, 8, 7, -0.5, -0.5, -0.5, -0.5 + tail]).view(1, 1, -1).requires_grad_()
    loss = selection_loss(scores, 4, torch.ones(1, 1, 7))
    loss.sum().backward()
    assert 0 < loss < 100
    assert 0 < scores.grad.abs().max() * -tail < 200


def test_one_entry_kept_or_evicted(scores, importance):
    for count in (1, 19):
        scores.grad = None
        selection_loss(scores, count, importance).sum().backward()
        assert scores.grad.isfinite().all()
        assert scores.grad.any()


def test_a_row_whose_context_nobody_attends_to_adds_nothing(scores, importance):
    importance[1] = 0
    losses = selection_loss(scores, 8, importance)
    losses.sum().backward()
    assert losses[0] > 0
    assert losses[1] == 0
    assert scores.grad.isfinite().all()
    assert not scores.grad[1].any()


def test_the_gradient_of_a_probability_does_not_vanish_with_it():
    """One entry that is attended to, of a score near the border or far below it: the pull on its logit is alike."""

    def pull(logit):
        logits = torch.linspace(-2, 2, 20).repeat(1, 1, 1).requires_grad_()
        with torch.no_grad():
            logits[..., 0] = logit
        selection_loss(logits.softmax(-1), 8, torch.eye(20)[0].view(1, 1, -1)).sum().backward()
        return float(logits.grad[0, 0, 0])

    assert pull(-9.0) < 0.9 * pull(-1.0) < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_share_a_budget_learn_which_of_them_needs_more(scores, importance, dtype):
    rule = SharedBudgetRule(make_press("expected_attention_head", 0.6), safeguard=0.2)
    importance = importance * torch.tensor([10.0, 1.0, 0.1])[:, None]
    scores = scores.detach().abs().to(dtype).requires_grad_()  # as presses give them: never negative

    def kept():
        return rule._top(scores, 8)

    before = kept().keep
    optimizer = torch.optim.Adam([scores], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        _loss_at_cut(kept().scores, 8, importance, even=False).sum().backward()
        assert scores.grad.isfinite().all()
        optimizer.step()
    after = kept().keep
    assert after.sum((1, 2)).tolist() == [24, 24]
    assert after.sum(-1).min() >= 1, "the floor of each head"
    assert (after[:, 0].sum(-1) > before[:, 0].sum(-1)).all()
    assert (importance * after).sum() > 1.1 * (importance * before).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_press_pins_is_safe_however_far_scores_spread(dtype):
    scores = torch.full((1, 1, 100), 1e-7, dtype=dtype)
    scores[..., 40:] = torch.linspace(0.1, 1, 60).to(dtype)
    scores[..., :20] = torch.finfo(dtype).max
    importance = torch.zeros(1, 1, 100)
    importance[..., :20] = 1.0
    assert selection_loss(scores.requires_grad_(), 30, importance).item() == 0


def test_the_loss_of_all_layers_at_once_is_the_mean_of_each():
    """Layers of unlike budgets, heads and dtypes, one without a score, a cut without one, heads that share a budget."""
    plan = EvictionPlan("two_region", (12, 20), ("knorm", "expected_attention"), (0.5, 0.5))
    generator = torch.Generator().manual_seed(3)
    heads = {4: 2}
    importance = {
        layer: [torch.rand(2, heads.get(layer, 3), cut, generator=generator) for cut in plan.cuts] for layer in range(6)
    }
    eviction = ForwardEviction(plan, None, torch.zeros(2, 24, dtype=torch.long), None, importance)

    def kept(cut, number, even=True, heads=3, dtype=torch.float32):
        scores = torch.randn(2, heads, cut, generator=generator).to(dtype).requires_grad_()
        return Kept(torch.ones(0), number, scores if even else scores.flatten(1)[:, None], even)

    unscored = Kept(torch.ones(0), 20)
    eviction.ranked = {
        0: [kept(12, 6), kept(20, 10, even=False)],
        1: [kept(12, 6), kept(20, 10, even=False)],
        2: [kept(12, 4), unscored],
        3: [unscored, unscored],
        4: [kept(12, 6, heads=2), unscored],
        5: [kept(12, 6, dtype=torch.bfloat16), unscored],
    }
    expected = torch.zeros(2)
    for layer, decided in eviction.ranked.items():
        for found, weights in zip(decided, importance[layer], strict=True):
            if found.scores is not None:
                expected += _loss_at_cut(found.scores, found.number, weights, found.even) / len(plan.cuts) / 5
    torch.testing.assert_close(eviction.selection_loss(), expected)
