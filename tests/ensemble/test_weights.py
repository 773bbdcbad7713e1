"""Fitted weights: the optimum by brute force, the guarantees, and what real text gives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.ensemble import linear, log_linear
from graft.ensemble.weights import fit_linear, fit_log_linear


def reads(seed, members=3, tokens=200, vocabulary=7):
    """Members that each know some of the truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = 2 * torch.randn(tokens, vocabulary, generator=generator)
    noise = [torch.randn(tokens, vocabulary, generator=generator) * (1 + i) for i in range(members)]
    gold = torch.multinomial(truth.softmax(-1), 1, generator=generator)[:, 0]
    return [(truth + n).log_softmax(-1) for n in noise], gold


def gold_of(log_probs, gold):
    return np.stack([each.gather(-1, gold[:, None])[:, 0].double().numpy() for each in log_probs])


@given(st.integers(0, 200), st.integers(2, 4))
def test_a_fitted_mixture_is_at_most_minus_log_weight_worse_than_any_member(seed, members):
    log_probs, gold = reads(seed, members, 40)
    fit = fit_linear(gold_of(log_probs, gold))
    assert fit.weights.sum() == pytest.approx(1)
    for weight, alone in zip(fit.weights, fit.members, strict=True):
        assert fit.loss <= alone + 1e-6
        assert weight == 0 or fit.loss <= alone - np.log(weight) + 1e-9


def test_em_finds_the_best_mixture_of_a_fine_grid():
    log_probs, gold = reads(1, 2)
    columns = gold_of(log_probs, gold)
    grid = np.linspace(0, 1, 10_001)[1:-1]
    losses = -np.logaddexp(columns[0][:, None] + np.log(grid), columns[1][:, None] + np.log(1 - grid)).mean(0)
    fit = fit_linear(columns)
    assert fit.weights[0] == pytest.approx(grid[losses.argmin()], abs=2e-3)
    assert fit.loss <= losses.min() + 1e-7


def test_importance_counts_a_token_as_often_as_repeating_it():
    columns = gold_of(*reads(2))
    times = np.arange(200) % 3
    repeated = fit_linear(np.repeat(columns, times, axis=1))
    assert np.allclose(fit_linear(columns, times).weights, repeated.weights, atol=1e-6)


def test_a_member_that_gives_zero_somewhere_keeps_the_mixture_finite():
    columns = np.log(
        np.array([[0.5, 0.0, 0.5], [0.1, 0.2, 0.1]]), where=[[1, 0, 1], [1, 1, 1]], out=np.full((2, 3), -np.inf)
    )
    fit = fit_linear(columns)
    assert np.isfinite(fit.loss)
    assert fit.members[0] == np.inf
    assert fit.weights[1] > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_fitted_product_has_no_better_neighbour_and_is_no_worse_than_any_member(seed):
    log_probs, gold = reads(seed)
    fit = fit_log_linear(log_probs, gold)

    def loss(weights):
        mixed = log_linear.combine([each.double() for each in log_probs], torch.tensor(weights), log_linear.Settings())
        return -mixed.gather(-1, gold[:, None]).mean().item()

    assert loss(fit.weights) == pytest.approx(fit.loss, abs=1e-6)
    assert fit.loss <= fit.members.min() + 1e-9
    generator = np.random.default_rng(0)
    for step in generator.normal(size=(50, 3)) * 0.05:
        assert loss(fit.weights + step) >= fit.loss - 1e-7


def test_an_anti_expert_is_given_a_negative_weight():
    torch.manual_seed(0)
    shared, own = torch.randn(500, 9), torch.randn(500, 9)
    gold = torch.multinomial(own.softmax(-1), 1)[:, 0]
    fit = fit_log_linear([(own + shared).log_softmax(-1), shared.log_softmax(-1)], gold)
    assert fit.weights[0] > 0.5
    assert fit.weights[1] < -0.5


def test_a_product_of_copies_is_fitted_too():
    log_probs, gold = reads(3, 1)
    twice = fit_log_linear(log_probs * 2, gold)
    assert twice.loss == pytest.approx(fit_log_linear(log_probs, gold).loss, abs=1e-6)
    assert np.isfinite(twice.weights).all()


def test_importance_of_a_product_counts_a_token_as_often_as_repeating_it():
    log_probs, gold = reads(4)
    times = torch.arange(200) % 3
    repeated = fit_log_linear([each.repeat_interleave(times, 0) for each in log_probs], gold.repeat_interleave(times))
    assert np.allclose(fit_log_linear(log_probs, gold, times.numpy()).weights, repeated.weights, atol=1e-5)


def test_the_fitted_mixture_loses_what_the_rule_gives():
    log_probs, gold = reads(5)
    fit = fit_linear(gold_of(log_probs, gold))
    mixed = linear.combine(log_probs, torch.tensor(fit.weights, dtype=torch.float32), linear.Settings())
    assert -mixed.gather(-1, gold[:, None]).mean().item() == pytest.approx(fit.loss, abs=1e-5)
