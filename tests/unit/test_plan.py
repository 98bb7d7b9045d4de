"""Plans: fixed by seed and step, within their ranges, and refused where they leave nothing to train on."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import UserError
from sparsekv.training.plan import EvictionPlan, PlanSampler


def sampler(**changes):
    defaults = {
        "geometry": "two_region",
        "rules": {"anchor": 1.0, "snapkv": 2.0, "random": 1.0},
        "num_cuts": 2,
        "min_cut": 0.25,
        "max_cut": 0.75,
        "ratio_draw": "uniform",
        "seed": 0,
    }
    return PlanSampler(**{**defaults, **changes})


def test_a_plan_depends_on_seed_and_step_alone():
    plans = [sampler().draw(step, 100, 0.3) for step in range(20)]
    later = sampler()
    assert [later.draw(step, 100, 0.3) for step in reversed(range(20))] == plans[::-1]
    assert len(set(plans)) == 20
    assert len({plan.seed for plan in plans}) == 20
    assert all(sampler(seed=1).draw(step, 100, 0.3) != plan for step, plan in enumerate(plans))


def test_the_schedule_moves_ratios_and_nothing_else():
    """So that two runs that differ in the ratio compare the same cuts and rules."""
    low, high = sampler().draw(3, 100, 0.3), sampler().draw(3, 100, 0.9)
    assert (low.cuts, low.rules, low.seed) == (high.cuts, high.rules, high.seed)
    assert all(a < b for a, b in zip(low.keep_ratios, high.keep_ratios, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(3, 60),
    num_cuts=st.integers(1, 5),
    bounds=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).map(sorted),
    step=st.integers(0, 1000),
)
def test_whatever_passes_the_check_draws_cuts_within_range_that_leave_a_suffix(length, num_cuts, bounds, step):
    tried = sampler(num_cuts=num_cuts, min_cut=bounds[0], max_cut=bounds[1])
    try:
        tried.check(length)
    except UserError:
        return
    plan = tried.draw(step, length, 0.5)
    assert len(plan.cuts) == len(plan.rules) == len(plan.keep_ratios) == num_cuts
    assert all(int(bounds[0] * length) <= cut <= int(bounds[1] * length) for cut in plan.cuts)
    assert plan.cuts[0] >= 1
    assert plan.cuts[-1] <= length - 2  # one token to predict from, one to predict
    assert list(plan.cuts) == sorted(set(plan.cuts))


def test_each_cut_falls_in_its_own_part_of_the_range_and_reaches_both_ends():
    cuts = [sampler().draw(step, 100, 0.3).cuts for step in range(2000)]
    assert {first for first, _ in cuts} == set(range(25, 50))
    assert {second for _, second in cuts} == set(range(50, 76))


def test_rules_are_drawn_by_weight():
    count = Counter(rule for step in range(2000) for rule in sampler().draw(step, 100, 0.3).rules)
    assert {name: round(n / 4000, 1) for name, n in count.items()} == {"snapkv": 0.5, "anchor": 0.2, "random": 0.2} or (
        abs(count["snapkv"] - 2000) < 150 and abs(count["anchor"] - 1000) < 150
    )
    assert set(sampler(rules={"anchor": 1.0, "random": 0.0}).draw(0, 100, 0.3).rules) == {"anchor"}


def test_ratios_fill_the_range_between_the_schedule_and_one_or_are_the_schedule():
    drawn = [ratio for step in range(500) for ratio in sampler().draw(step, 100, 0.3).keep_ratios]
    assert 0.3 <= min(drawn) < 0.31
    assert 0.99 < max(drawn) <= 1
    assert abs(sum(drawn) / len(drawn) - 0.65) < 0.03
    assert set(sampler(ratio_draw="ceiling").draw(0, 100, 0.3).keep_ratios) == {0.3}


@pytest.mark.parametrize("geometry", ["streaming", "global"])
def test_other_geometries_have_no_cut_and_one_rule(geometry):
    tried = sampler(geometry=geometry, min_cut=0.9, max_cut=0.1)
    tried.check(4)  # cuts do not matter
    plan = tried.draw(0, 100, 0.3)
    assert (plan.cuts, len(plan.rules), len(plan.keep_ratios), plan.first_query) == ((), 1, 1, 0)


def test_first_query_is_the_first_cut():
    assert EvictionPlan("two_region", (30, 60), ("anchor", "tova"), (0.5, 0.5)).first_query == 30


@pytest.mark.parametrize(
    ("changes", "length", "flag"),
    [
        ({"min_cut": 0.0}, 100, "--min_cut 0.0"),
        ({"max_cut": 1.0}, 100, "--max_cut 1.0"),
        ({"min_cut": 0.8, "max_cut": 0.7}, 100, "--min_cut 0.8"),
        ({"num_cuts": 0}, 100, "--num_cuts 0"),
        ({"num_cuts": 52}, 100, "--num_cuts 52"),  # 51 positions
        ({"num_cuts": 1, "min_cut": 0.5, "max_cut": 0.99}, 100, "100 tokens"),  # one token after the cut
        ({"num_cuts": 1, "min_cut": 0.1, "max_cut": 0.5}, 9, "9 tokens"),  # cut 0
    ],
)
def test_cuts_that_leave_no_room_are_refused_by_flag(changes, length, flag):
    with pytest.raises(UserError, match=flag) as error:
        sampler(**changes).check(length)
    assert "\n" not in str(error.value)


def test_the_tightest_cuts_are_accepted():
    sampler(num_cuts=51).check(100)
    sampler(num_cuts=1, min_cut=0.98, max_cut=0.98).check(100)
    sampler(num_cuts=1, min_cut=0.34, max_cut=0.34).check(3)


@pytest.mark.parametrize(
    "arguments",
    [
        ("two_region", (), ("anchor",), (0.5,)),
        ("two_region", (4, 8), ("anchor",), (0.5,)),
        ("two_region", (4,), ("anchor",), (0.5, 0.5)),
        ("two_region", (8, 4), ("anchor",) * 2, (0.5,) * 2),
        ("two_region", (4, 4), ("anchor",) * 2, (0.5,) * 2),
        ("two_region", (0,), ("anchor",), (0.5,)),
        ("global", (), (), ()),
    ],
)
def test_inconsistent_plans_are_refused(arguments):
    with pytest.raises(ValueError, match="cuts"):
        EvictionPlan(*arguments)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 30, float("nan")])
def test_ratios_out_of_range_are_refused_as_keep_ratios(ratio):
    with pytest.raises(UserError, match=rf"keep ratio {ratio}: must be in \(0, 1\]"):
        EvictionPlan("two_region", (4, 8), ("anchor", "knorm"), (0.5, ratio))


def test_unknown_geometry_names_the_known_ones():
    with pytest.raises(UserError, match="--geometry 'spiral' must be one of two_region, streaming, global"):
        EvictionPlan("spiral", (), ("anchor",), (0.5,))
