"""Intervals cover the truth as often as they say, p-values are uniform when nothing differs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparsekv.evaluation.comparison.statistics import (
    DRAWS,
    FLIPS,
    Sampled,
    TaskScores,
    average,
    bootstrap_means,
    by_context,
    flips_for,
    holm,
    interval,
    p_values,
    ratio,
    sign_flipped_means,
)

TRIALS = 600  # experiments, each a column


def rows(values: np.ndarray, seed: int = 0) -> TaskScores:
    """Each with a context of its own."""
    return by_context(values, np.arange(len(values)), len(values), seed)


def resampled(values: np.ndarray, seed: int) -> Sampled:
    """Means of draws of rows."""
    return bootstrap_means(rows(values, seed))


def chance(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """p-values of one task's differences."""
    return p_values([rows(values, seed)])


def covered(sampled: Sampled, truth: float) -> float:
    """Share of the columns whose interval holds the truth."""
    low, high = interval(sampled)
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("law", ["normal", "coin", "skewed"])
def test_interval_of_a_mean_covers_it(law: str) -> None:
    rng = np.random.default_rng(1)
    size = (60, TRIALS)
    values = {
        "normal": lambda: rng.normal(50.0, 10.0, size),
        "coin": lambda: 100.0 * rng.integers(2, size=size),
        "skewed": lambda: rng.exponential(50.0, size),
    }[law]()
    assert 0.91 < covered(resampled(values, 0), 50.0) < 0.97


def test_interval_of_retention_covers_it_and_pairing_narrows_it() -> None:
    rng = np.random.default_rng(2)
    full = rng.normal(80.0, 20.0, (60, TRIALS))
    evicted = 0.75 * full + rng.normal(0.0, 5.0, full.shape)
    paired = ratio(resampled(evicted, 0), resampled(full, 0))
    unpaired = ratio(resampled(evicted, 0), resampled(full, 1))
    assert 0.91 < covered(paired, 0.75) < 0.97
    assert np.ptp(interval(paired), axis=0).mean() < 0.5 * np.ptp(interval(unpaired), axis=0).mean()


def test_interval_of_an_average_over_tasks_covers_it() -> None:
    rng = np.random.default_rng(3)
    tasks = [rng.normal(mean, spread, (n, TRIALS)) for mean, spread, n in [(10.0, 5.0, 40), (90.0, 30.0, 60)]]
    together = average([resampled(values, seed) for seed, values in enumerate(tasks)])
    assert np.allclose(together.value, (tasks[0].mean(axis=0) + tasks[1].mean(axis=0)) / 2)
    assert 0.92 < covered(together, 50.0) < 0.97


def test_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(4)
    full = rng.exponential(50.0, 40)
    evicted = full * rng.random(40)
    ours = resampled(np.column_stack([evicted, full]), 0)
    for statistic, figure in [
        (lambda a, b, axis: a.mean(axis=axis), ours.take([0])),
        (lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis), ratio(ours.take([0]), ours.take([1]))),
    ]:
        theirs = stats.bootstrap((evicted, full), statistic, paired=True, method="percentile", rng=0)
        width = np.ptp(theirs.confidence_interval)
        assert np.ravel(interval(figure)) == pytest.approx(theirs.confidence_interval, abs=0.06 * width)


@pytest.mark.parametrize("values", [np.full((20, 1), 100 / 3), np.array([[70.0]]), np.zeros((5, 1))])
def test_nothing_to_draw_from_gives_no_interval(values: np.ndarray) -> None:
    assert np.isnan(interval(resampled(values, 0))).all()
    assert chance(values - values) == 1.0


def test_ratio_to_nothing_is_undefined() -> None:
    rows = np.array([[1.0, 0.0, 0.0]] * 4 + [[2.0, 0.0, 9.0]])
    means = resampled(rows, 0)
    undefined = ratio(means.take([0, 1]), means.take([1, 1]))
    assert np.isnan(undefined.value).all()
    assert np.isnan(interval(undefined)).all()
    rare = ratio(means.take([0]), means.take([2]))  # a third of the resamples lack the only row above 0
    assert rare.value == pytest.approx(1.2 / 1.8)
    assert np.isnan(interval(rare)).all()


def test_p_values_are_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(5)
    tasks = [
        rng.normal(0.0, spread, (n, TRIALS)) * (rng.random((n, TRIALS)) < 0.5) for spread, n in ((5, 30), (50, 20))
    ]
    together = [rows(values, seed) for seed, values in enumerate(tasks)]
    assert stats.kstest(chance(tasks[0]), "uniform").pvalue > 0.01
    assert stats.kstest(p_values(together), "uniform").pvalue > 0.01
    assert np.mean(chance(tasks[0] + 3.0) < 0.05) > 0.9


def test_p_values_of_right_or_wrong_scores_keep_their_level() -> None:
    rng = np.random.default_rng(6)
    differences = rng.choice([0.0, 100.0, -100.0], p=[0.6, 0.2, 0.2], size=(150, TRIALS))
    p = chance(differences)
    for level in (0.05, 0.2, 0.5):  # ties count against a difference, so the share lies a step lower
        assert level - 0.12 < np.mean(p <= level) < level + 3 * np.sqrt(level * (1 - level) / TRIALS)


def test_p_value_is_never_zero() -> None:
    assert chance(np.ones((100, 1))) == 1 / (1 + FLIPS)


def test_p_value_is_the_exact_one_of_scipy() -> None:
    differences = np.array([3.0, -1.0, 4.0, 1.0, 5.0, 2.0, -6.0, 5.0, 3.0])
    exact = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert chance(differences[:, None]) == pytest.approx(exact, abs=0.012)


def test_flipping_two_runs_alike_is_flipping_their_difference() -> None:
    runs = rows(np.random.default_rng(6).random((30, 2)))
    both = sign_flipped_means(runs, np.random.default_rng(0), 500)
    apart = sign_flipped_means(runs.take([1]) - runs.take([0]), np.random.default_rng(0), 500)
    assert np.allclose(both[:, 1] - both[:, 0], apart[:, 0])


def test_a_cell_does_not_depend_on_its_neighbours_or_on_chance() -> None:
    values = np.random.default_rng(7).random((500, 3))  # flips take several blocks
    assert np.allclose(resampled(values, 0).take([2]).draws, resampled(values[:, [2]], 0).draws)
    assert not np.allclose(resampled(values, 0).draws, resampled(values, 1).draws)
    differences = values - 0.51
    assert chance(differences)[2] == chance(differences[:, [2]])
    assert (chance(differences) != chance(differences, 1)).all()


@pytest.mark.parametrize("cells", [1, 200, 201, 1_001, 1_500])
def test_a_large_family_leaves_room_for_significance(cells: int) -> None:
    flips = flips_for(cells)
    assert cells / (1 + flips) <= 0.01
    assert (flips == FLIPS) == (cells <= 200)  # figures of families of the usual size do not change
    worse = rows(np.random.default_rng(8).normal(-30.0, 5.0, (20, 1)))
    p = p_values([worse], flips)
    assert holm(np.repeat(p, cells)).max() < 0.05


def test_more_flips_come_nearer_to_the_exact_p_value() -> None:
    differences = np.random.default_rng(9).normal(0.4, 1.0, (9, 40))
    signs = np.array(list(itertools.product([-1, 1], repeat=9)))
    exact = np.mean(np.abs(signs @ differences) >= np.abs(differences.sum(axis=0)) - 1e-9, axis=0)
    few, many = (p_values([rows(differences)], flips) for flips in (FLIPS, 399_999))
    assert np.abs(many - exact).mean() < 0.5 * np.abs(few - exact).mean()


def test_contexts_of_one_row_are_rows() -> None:
    values = np.random.default_rng(10).random((30, 3))
    rng = np.random.default_rng(0)
    drawn = rng.integers(30, size=(DRAWS, 30))
    assert np.allclose(resampled(values, 0).draws, values[drawn].mean(axis=1), rtol=1e-12)
    signs = np.random.default_rng(0).integers(2, size=(100, 30), dtype=np.int8) * 2 - 1
    flipped = sign_flipped_means(rows(values), np.random.default_rng(0), 100)
    assert np.allclose(flipped, signs @ values / 30, rtol=1e-12)


def test_contexts_are_drawn_with_all_of_their_rows() -> None:
    values, contexts = np.array([[1.0], [2.0], [4.0], [8.0]]), np.array([1, 0, 1, 1])
    scores = by_context(values, contexts, 2, 0)
    assert scores.mean() == 3.75
    assert set(bootstrap_means(scores).draws[:, 0]) == {2.0, 3.75, 13 / 3}
    assert set(sign_flipped_means(scores, np.random.default_rng(0), 50)[:, 0]) == {3.75, 2.75, -2.75, -3.75}


def test_a_draw_without_a_row_leaves_no_interval() -> None:
    values = np.random.default_rng(12).random((6, 2)) + 1
    means = bootstrap_means(by_context(values, np.array([0, 0, 1, 1, 2, 2]), 5, 0))  # two contexts are other tasks'
    for undefined in (means, ratio(means.take([0]), means.take([1])), average([resampled(values, 0), means])):
        assert np.isfinite(undefined.value).all()
        assert np.isnan(interval(undefined)).all()


def test_rows_of_one_context_are_no_more_evidence_than_they_are() -> None:
    rng = np.random.default_rng(11)
    contexts = np.repeat(np.arange(30), rng.integers(4, 13, 30))  # 30 documents, 4 to 12 questions about each
    alike = rng.normal(0.0, 1.0, (30, TRIALS))[contexts]
    values = alike + rng.normal(0.0, 1.0, alike.shape)  # correlated by 0.5, and nothing differs
    assert np.mean(chance(values) < 0.05) > 0.3
    assert covered(resampled(values, 0), 0.0) < 0.7
    clustered = by_context(values, contexts, 30, 0)
    assert 0.02 < np.mean(p_values([clustered]) < 0.05) < 0.08
    assert 0.90 < covered(bootstrap_means(clustered), 0.0) < 0.97


def test_holm_by_hand() -> None:
    # 4 × .005, 3 × .01, 2 × .03, 1 × .04 but not below the one before.
    assert holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005])) == pytest.approx(
        [0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True
    )
    assert holm(np.array([0.4, 0.9])).tolist() == [0.8, 0.9]
    assert holm(np.array([0.6, 0.9])).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_the_p_values_and_bonferroni(values: list[float]) -> None:
    p = np.array(values)
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, p * len(p))).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
