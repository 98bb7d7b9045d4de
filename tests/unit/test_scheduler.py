import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.errors import UserError
from sparsekv.training.scheduler import make_scheduler

MODES = ("fixed", "curriculum", "adaptive")
PERPLEXITIES = st.sampled_from([9.0, 10.4, 10.6, 30.0, math.nan, math.inf])  # the threshold is 10.5


def adaptive(**overrides):
    options = {"initial_keep_ratio": 0.9, "min_keep_ratio": 0.3, "patience": 2, "step_size": 0.2, "ppl_threshold": 0.05}
    scheduler = make_scheduler("adaptive", total_steps=100, **options | overrides)
    scheduler.set_reference(10.0)
    return scheduler


def ratios(scheduler, perplexities):
    """The keep ratio after each observation, one observation a step."""
    seen = []
    for perplexity in perplexities:
        scheduler.step(scheduler.global_step + 1)
        scheduler.observe(perplexity)
        seen.append(round(scheduler.keep_ratio, 6))
    return seen


def test_fixed_is_the_lowest_ratio_throughout():
    scheduler = make_scheduler("fixed", total_steps=10, initial_keep_ratio=0.9, min_keep_ratio=0.4)
    assert {scheduler.keep_ratio, *ratios(scheduler, [1.0] * 10)} == {0.4}


def test_curriculum_warms_up_falls_linearly_and_holds():
    scheduler = make_scheduler(
        "curriculum",
        total_steps=20,
        initial_keep_ratio=0.9,
        min_keep_ratio=0.3,
        warmup_fraction=0.2,
        reach_fraction=0.8,
    )
    seen = [scheduler.keep_ratio, *ratios(scheduler, [1.0] * 20)]
    assert seen[:5] == [0.9] * 5
    assert seen[4:17] == pytest.approx([0.9 - 0.05 * k for k in range(13)])
    assert seen[16:] == [0.3] * 5
    assert scheduler.keep_ratio == 0.3  # exactly


@given(
    total=st.integers(1, 400),
    bounds=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    fractions=st.tuples(st.floats(0, 0.9), st.floats(0.05, 0.1)),
)
def test_curriculum_never_rises_and_ends_at_the_lowest(total, bounds, fractions):
    low, high = bounds
    scheduler = make_scheduler(
        "curriculum",
        total_steps=total,
        initial_keep_ratio=high,
        min_keep_ratio=low,
        warmup_fraction=fractions[0],
        reach_fraction=sum(fractions),
    )
    seen = [scheduler.keep_ratio]
    for step in range(1, total + 1):
        scheduler.step(step)
        seen.append(scheduler.keep_ratio)
    assert seen[0] == high
    assert seen[-1] == low
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(seen))


def test_adaptive_lowers_within_the_threshold_down_to_the_lowest():
    assert ratios(adaptive(), [10.5, 9.0, 10.0, 10.0, 10.0]) == [0.7, 0.5, 0.3, 0.3, 0.3]


def test_adaptive_holds_then_reverts_to_the_best_and_tries_again():
    #                            within over  over: 0.7 was the best  within: again
    assert ratios(adaptive(), [10.0, 10.0, 10.6, 10.6, 10.0]) == [0.7, 0.5, 0.5, 0.7, 0.5]


def test_adaptive_counts_only_observations_over_in_a_row():
    assert ratios(adaptive(), [10.0, 10.6, 10.0, 10.6, 10.6]) == [0.7, 0.7, 0.5, 0.5, 0.7]


def test_adaptive_stays_at_the_initial_ratio_when_nothing_was_within():
    assert ratios(adaptive(), [99.0, math.nan, math.inf, 10.6]) == [0.9] * 4


def test_adaptive_does_not_move_its_reference():
    scheduler = adaptive()
    assert not scheduler.needs_reference
    ratios(scheduler, [8.0, 12.0, 9.0])
    with pytest.raises(RuntimeError, match="set once"):
        scheduler.set_reference(12.0)
    assert scheduler.reference == 10.0


def test_adaptive_needs_a_finite_reference_before_it_observes():
    scheduler = make_scheduler("adaptive", total_steps=10)
    assert scheduler.needs_reference
    with pytest.raises(RuntimeError, match="set_reference"):
        scheduler.observe(10.0)
    with pytest.raises(RuntimeError, match="nan"):
        scheduler.set_reference(math.nan)


def test_adaptive_takes_one_observation_a_step():
    scheduler = adaptive()
    for _ in range(3):
        scheduler.observe(10.0)
    assert scheduler.keep_ratio == pytest.approx(0.7)


@given(perplexities=st.lists(PERPLEXITIES, max_size=60), patience=st.integers(1, 4), step_size=st.floats(0.01, 0.9))
def test_adaptive_stays_in_its_range(perplexities, patience, step_size):
    assert all(0.3 <= r <= 0.9 for r in ratios(adaptive(patience=patience, step_size=step_size), perplexities))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", [3, 5, 0])  # again, skipped, backwards
def test_steps_are_consecutive(mode, wrong):
    scheduler = make_scheduler(mode, total_steps=10)
    for step in (1, 2, 3):
        scheduler.step(step)
    with pytest.raises(RuntimeError, match="step 3"):
        scheduler.step(wrong)
    scheduler.step(4)


@given(
    mode=st.sampled_from(MODES),
    events=st.lists(st.none() | PERPLEXITIES, min_size=1, max_size=40),  # None: a step without an evaluation
    data=st.data(),
)
def test_interrupted_equals_uninterrupted(mode, events, data):
    cut = data.draw(st.integers(0, len(events)))
    repeat_evaluation = data.draw(st.booleans())

    def fresh():
        return make_scheduler(mode, total_steps=len(events), initial_keep_ratio=0.9, min_keep_ratio=0.2, patience=2)

    def play(scheduler, some):
        for perplexity in some:
            scheduler.step(scheduler.global_step + 1)
            if perplexity is not None:
                scheduler.observe(perplexity)
            seen.append(scheduler.keep_ratio)
        return scheduler

    seen: list[float] = []
    scheduler = fresh()
    scheduler.set_reference(10.0)
    whole_state = play(scheduler, events).state_dict()
    whole, seen = seen, []

    scheduler = fresh()
    scheduler.set_reference(10.0)
    saved = json.dumps(play(scheduler, events[:cut]).state_dict())
    resumed = fresh()
    resumed.load_state_dict(json.loads(saved))
    assert not resumed.needs_reference
    if repeat_evaluation and cut and events[cut - 1] is not None:
        resumed.observe(events[cut - 1])
    assert play(resumed, events[cut:]).state_dict() == whole_state
    assert seen == whole


def test_a_state_of_another_mode_is_refused():
    state = make_scheduler("fixed", total_steps=10).state_dict()
    with pytest.raises(UserError, match=r"--scheduler_mode curriculum.*fixed"):
        make_scheduler("curriculum", total_steps=10).load_state_dict(state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_keep_ratio": 1.5}, "--initial_keep_ratio 1.5"),
        ({"initial_keep_ratio": math.nan}, "--initial_keep_ratio nan"),
        ({"min_keep_ratio": 0.0}, "--min_keep_ratio 0.0"),
        ({"min_keep_ratio": -0.1}, "--min_keep_ratio -0.1"),
        ({"initial_keep_ratio": 0.2, "min_keep_ratio": 0.5}, "--initial_keep_ratio 0.2.*--min_keep_ratio, 0.5"),
        ({"total_steps": 0}, "--max_steps 0"),
        ({"warmup_fraction": 1.0}, "--warmup_fraction 1.0"),
        ({"warmup_fraction": 0.5, "reach_fraction": 0.5}, "--reach_fraction 0.5"),
        ({"reach_fraction": 1.1}, "--reach_fraction 1.1"),
        ({"ppl_threshold": -0.1}, "--ppl_threshold -0.1"),
        ({"patience": 0}, "--patience 0"),
        ({"step_size": 0.0}, "--step_size 0.0"),
    ],
)
def test_bad_values_name_the_flag(mode, options, message):
    with pytest.raises(UserError, match=message):
        make_scheduler(mode, **{"total_steps": 10} | options)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="--scheduler_mode cosine"):
        make_scheduler("cosine", total_steps=10)
