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


def test_too_many_members_are_refused():
    with pytest.raises(ValueError, match="expected 5 members or fewer, found 6"):
        contributions(columns(6), NOTHING)
