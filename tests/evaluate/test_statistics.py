"""Intervals and tests against closed forms, scipy and simulation."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from graft.evaluate.statistics import bootstrap, mcnemar, paired, redrawn, unvaried, wilson


def mean_of(values):
    values = np.asarray(values, float)
    return lambda counts: counts @ values / len(values)


def compared(first, second, items):
    """(low, high, p) of two scores on the same resampled items, as pairs of models are compared."""
    return paired(*redrawn([first, second], items, seed=0), items)


def test_wilson_is_scipys():
    for successes, trials in [(0, 10), (3, 10), (10, 10), (57, 200)]:
        expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert wilson(successes, trials) == pytest.approx((expected.low, expected.high))


def test_the_bootstrap_of_a_mean_is_close_to_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(mean_of(values), 400, seed=0)
    half = norm.ppf(0.975) * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        values = random.exponential(size=60)
        low, high = bootstrap(mean_of(values), 60, seed=trial, draws=400)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.98  # 95 % less what skewness costs at 60 items


def test_the_same_seed_gives_the_same_interval_and_another_one_does_not():
    score = mean_of(np.arange(50.0))
    assert bootstrap(score, 50, seed=3) == bootstrap(score, 50, seed=3)
    assert bootstrap(score, 50, seed=3) != bootstrap(score, 50, seed=4)


def test_of_one_item_nothing_is_known():
    assert np.isnan(bootstrap(mean_of([1.0]), 1, seed=0)).all()


def test_the_bootstrap_of_few_items_is_the_exact_distribution():
    values = np.array([0.0, 1.0, 5.0])
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=3))
    low, high = bootstrap(mean_of(values), 3, seed=0, draws=40_000)
    # each of the 27 draws is one of 27, so that both ends are reached in more than 2.5 % of them
    assert (low, high) == tuple(np.quantile(means, [0.025, 0.975], method="inverted_cdf"))


def test_pairing_sees_a_small_steady_difference_that_intervals_hide():
    random = np.random.default_rng(5)
    hard = random.normal(size=100) * 10
    low, high, p = compared(mean_of(hard + 0.3 + 0.1 * random.normal(size=100)), mean_of(hard), 100)
    assert 0 < low < 0.3 < high < 0.5
    assert p < 0.01


def test_scores_are_redrawn_alike():
    random = np.random.default_rng(7)
    first, second = mean_of(random.normal(size=30)), mean_of(random.normal(size=30))
    one, two, again = redrawn([first, second, first], 30, seed=0, draws=100)
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(two, redrawn([second], 30, seed=0, draws=100)[0])


def test_equal_models_do_not_differ():
    values = mean_of(np.random.default_rng(6).normal(size=50))
    assert compared(values, values, 50) == (0.0, 0.0, 1.0)


def test_mcnemar_is_the_binomial_test_on_what_only_one_got_right():
    first = np.array([1, 1, 1, 1, 1, 0, 0, 1], bool)
    second = np.array([0, 0, 0, 0, 1, 0, 1, 1], bool)
    assert mcnemar(first, second) == pytest.approx(binomtest(4, 5).pvalue)
    assert mcnemar(first, first) == 1.0


@pytest.mark.parametrize("items", [2, 3, 6])
def test_few_items_prove_little_however_far_apart_two_models_are(items):
    """One model ahead on every item: no test of signs can give less than 2^(1 - items)."""
    first, second = mean_of(np.ones(items)), mean_of(np.arange(items) + 5.0)
    assert compared(first, second, items)[2] == 2.0 ** (1 - items)


@pytest.mark.parametrize("items", [2, 30, 1000])
def test_items_that_are_all_right_or_all_wrong_have_wilsons_interval(items):
    assert unvaried(1.0, items, (0, 1)) == pytest.approx(wilson(items, items))
    assert unvaried(0.0, items, (0, 1)) == pytest.approx(wilson(0, items))
    assert unvaried(0.0, items, (-2, 2)) == pytest.approx((-2 * wilson(0, items)[1], 2 * wilson(0, items)[1]))


def test_the_truth_lies_in_the_interval_of_items_that_all_agree():
    """One item in 30 scores anything: of 30 that were drawn all are perfect in more than a third of the trials."""
    random, covered = np.random.default_rng(3), []
    for _ in range(300):
        values = np.where(random.random(30) < 1 / 30, random.random(30), 1.0)
        low, high = bootstrap(mean_of(values), 30, seed=0, draws=50)
        if low == high:
            low, high = unvaried(1.0, 30, (0, 1))
            covered.append(low <= 1 - 0.5 / 30 <= high)
    assert len(covered) > 90
    assert all(covered)
