"""Contributions: by hand for two members, and the properties that define Shapley's value."""

import math

import numpy as np
import pytest
import torch

from graft.ensemble.contributions import contributions, contributions_to_product
from graft.ensemble.kept import Columns
from graft.ensemble.weights import fit_linear, fit_log_linear

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


def product(members=3, tokens=90, vocabulary=12):
    """Columns that are the whole vocabulary, with the empty rest behind them."""
    generator = torch.Generator().manual_seed(2)
    told = [torch.randn(tokens, vocabulary, generator=generator).log_softmax(-1) for _ in range(members)]
    gold = torch.stack(told[:2]).sum(0).add(torch.randn(tokens, vocabulary, generator=generator)).argmax(-1)
    empty = torch.full((tokens, 1), -torch.inf)
    counts = torch.cat([torch.zeros(tokens, vocabulary), empty], 1)
    return told, Columns([torch.cat([each, empty], 1) for each in told], gold, counts)


def test_a_products_members_by_refitting_whole_distributions():
    told, columns = product(2)
    both, first, second = (fit_log_linear(each, columns.place).loss for each in (told, told[:1], told[1:]))
    nothing = math.log(12)
    one, other = contributions_to_product(columns, nothing)
    assert one.left_out == pytest.approx(second - both, abs=1e-5)
    assert one.shapley == pytest.approx(((nothing - first) + (second - both)) / 2, abs=1e-5)
    assert one.shapley + other.shapley == pytest.approx(nothing - both, abs=1e-5)


def test_a_member_that_says_nothing_adds_nothing_to_a_product():
    told, columns = product(2)
    even = torch.full_like(told[0], -math.log(12))
    silent = torch.cat([even, columns.log_probs[0][:, -1:]], 1)
    with_it = Columns([*columns.log_probs, silent], columns.place, columns.log_counts)
    *_, found = contributions_to_product(with_it, math.log(12))
    assert found.left_out == pytest.approx(0, abs=1e-5)
    assert found.shapley == pytest.approx(0, abs=1e-5)


def test_the_interval_of_a_products_member_is_that_of_documents_drawn_anew():
    told, columns = product(3, 240)
    texts = np.repeat(np.arange(24), 10)
    found = contributions_to_product(columns, math.log(12), texts=texts)
    gain = np.zeros(240)
    for sign, members in ((1, [0, 1, 2]), (-1, [0, 2])):
        part = [told[member] for member in members]
        weights = torch.tensor(fit_log_linear(part, columns.place).weights)
        mixed = sum(w * each.double() for w, each in zip(weights, part, strict=True)).log_softmax(-1)
        gain += sign * mixed.gather(-1, columns.place[:, None])[:, 0].numpy()
    draw = np.random.default_rng(5).integers(0, 24, (3000, 24))
    low, high = np.quantile(gain.reshape(24, 10).mean(1)[draw].mean(1), [0.025, 0.975])
    assert (found[1].low, found[1].high) == pytest.approx((low, high), abs=0.02)
    assert found[1].low < found[1].left_out < found[1].high
