"""Contributions: by hand for two members, and the properties that define Shapley's value."""

import math

import numpy as np
import pytest

from graft.ensemble.contributions import contributions
from graft.ensemble.weights import fit_linear

NOTHING = math.log(50)


def columns(members=3, tokens=150):
    return np.log(np.random.default_rng(0).beta(1, 4, size=(members, tokens)))


def test_two_members_by_hand():
    told = columns(2)
    both, first, second = fit_linear(told).loss, fit_linear(told[:1]).loss, fit_linear(told[1:]).loss
    one, _ = contributions(told, NOTHING, tolerance=1e-7)
    assert one.left_out == pytest.approx(second - both, abs=1e-6)
    assert one.shapley == pytest.approx(((NOTHING - first) + (second - both)) / 2, abs=1e-6)


def test_shapley_values_sum_to_what_the_mixture_gains():
    told = columns(4)
    total = sum(each.shapley for each in contributions(told, NOTHING))
    assert total == pytest.approx(NOTHING - fit_linear(told).loss, abs=1e-4)


def test_copies_share_their_value_and_neither_is_missed():
    told = columns(2)
    first, copy, _ = contributions(np.stack([told[0], told[0], told[1]]), NOTHING)
    assert first.shapley == pytest.approx(copy.shapley)
    assert first.left_out == pytest.approx(0, abs=1e-4)


def test_a_member_that_is_worse_everywhere_is_not_missed():
    told = columns(2)
    *_, worse = contributions(np.stack([*told, told.min(0) - 1]), NOTHING)
    assert worse.left_out == pytest.approx(0, abs=1e-4)


def test_of_many_members_it_is_known_who_is_missed_but_not_the_value_over_all_orders():
    told = columns(6)
    found = contributions(told, NOTHING)
    rest = fit_linear(told[1:]).loss - fit_linear(told).loss
    assert found[0].left_out == pytest.approx(rest, abs=1e-4)
    assert all(each.shapley is None for each in found)


def test_the_interval_is_that_of_documents_drawn_anew_and_holds_what_is_missed():
    told, texts = columns(3, 400), np.repeat(np.arange(40), 10)
    importance = np.random.default_rng(1).uniform(0.5, 2, 400)
    found = contributions(told, NOTHING, importance, tolerance=1e-9, texts=texts)
    whole, rest = fit_linear(told, importance), fit_linear(told[[0, 2]], importance)
    with_it = np.log(whole.weights @ np.exp(told))
    without = np.log(rest.weights @ np.exp(told[[0, 2]]))
    draw, gains = np.random.default_rng(5), []
    for _ in range(2000):
        chosen = draw.integers(0, 40, 40)
        at = (chosen[:, None] * 10 + np.arange(10)).ravel()
        gains.append(np.average((with_it - without)[at], weights=importance[at]))
    assert found[1].low < found[1].left_out < found[1].high
    assert (found[1].low, found[1].high) == pytest.approx(np.quantile(gains, [0.025, 0.975]), abs=0.006)


@pytest.mark.parametrize("texts", [None, np.zeros(150)])
def test_without_several_documents_there_is_no_interval(texts):
    assert {(each.low, each.high) for each in contributions(columns(), NOTHING, texts=texts)} == {(None, None)}
