"""The tests on rows, against their definitions and on rows made for it."""

import numpy as np
import pytest

from graft.kinship import statistics


def rows(seed, count=40, width=24):
    return statistics.unit(np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32))


def test_unit_rows_are_centred_of_length_one_and_without_spread_zero():
    made = statistics.unit(np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]], dtype=np.float32))
    assert made[0] == pytest.approx(np.array([-2.0, -1.0, 3.0]) / np.sqrt(14))
    assert (made[1] == 0).all()


def test_the_correlation_in_place_is_the_mean_correlation_of_rows():
    a, b = rows(0), rows(1)
    by_hand = np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])
    assert statistics.in_place(statistics.cross([(a, b)]), draws=9).value == pytest.approx(by_hand, abs=1e-6)


def test_of_wide_rows_some_dimensions_are_taken_evenly(monkeypatch):
    a, b = rows(0), rows(1)
    monkeypatch.setattr(statistics, "WIDEST", 7)
    made = statistics.cross([(a, b), (b, a), (a, a)])
    assert made.shape == (6, 6)
    by_hand = [np.corrcoef(x[::4], y[::4])[0, 1] for x, y in zip(a, b, strict=True)]
    # the third pair is one with itself: 1
    assert np.trace(made) == pytest.approx((2 * np.mean(by_hand) + 1) / 3, abs=1e-6)


def test_p_in_place_is_the_share_of_shuffles_that_reach_the_value():
    a, b = rows(0, width=4), rows(1, width=4)
    found = statistics.in_place(statistics.cross([(a, b)]), draws=4000)
    from itertools import permutations

    values = [
        np.mean([np.dot(x, y[list(order)]) for x, y in zip(a, b, strict=True)]) for order in permutations(range(4))
    ]
    assert found.p == pytest.approx(np.mean([v >= found.value - 1e-6 for v in values]), abs=0.03)


def test_p_of_unrelated_rows_is_uniform():
    ps = [statistics.in_place(statistics.cross([(rows(i), rows(i + 1000))]), draws=99).p for i in range(300)]
    assert np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(ps) == pytest.approx(0.5, abs=0.06)


def test_a_direction_that_unrelated_models_share_does_not_make_them_related():
    """Both have a few large dimensions of the hidden state, but not the same ones."""
    small = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        loud = [1 + 9 * (random.permutation(24) < 3) for _ in range(2)]
        a, b = (statistics.unit(rows(seed + 500 * i) * loud[i] + loud[i].astype(np.float32)) for i in range(2))
        small += statistics.in_place(statistics.cross([(a, b)]), draws=99).p <= 0.05
    assert small <= 9


def test_rows_in_another_order_are_found_again():
    a = rows(0)
    found = statistics.matched([a[:8]], [[a[::-1][:20], a[::-1][20:]]], draws=99)
    assert found.value == pytest.approx(1, abs=1e-5)
    assert (found.p, found.excess) == (0.01, pytest.approx(1, abs=1e-4))
    assert statistics.matched([rows(1)[:8]], [[a]], draws=99).excess < 0.1


def test_the_best_order_undoes_a_shuffle():
    a, order = rows(0, count=24, width=60), np.random.default_rng(1).permutation(24)
    assert (order[statistics.best_order(a @ a[order].T)] == np.arange(24)).all()
