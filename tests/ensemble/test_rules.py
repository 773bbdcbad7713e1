"""The rules against their formulas, computed in probabilities and float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.ensemble import contrastive, experts, linear, log_linear

NO = linear.Settings()


def distributions(seed, members, shape=(2, 3), tokens=11):
    torch.manual_seed(seed)
    return [(3 * torch.randn(*shape, tokens)).log_softmax(-1) for _ in range(members)]


def normalised(scores):
    return scores / scores.sum(-1, keepdim=True)


@given(st.integers(0, 1000), st.integers(1, 4))
def test_linear_is_the_mixture_of_probabilities(seed, members):
    log_probs = distributions(seed, members)
    weights = torch.rand(members) + 0.01
    weights /= weights.sum()
    expected = sum(w.double() * lp.double().exp() for w, lp in zip(weights, log_probs, strict=True))
    found = linear.combine(log_probs, weights, NO)
    assert torch.allclose(found.double().exp(), expected, rtol=1e-5, atol=1e-9)


@given(st.integers(0, 1000), st.lists(st.floats(-2, 2), min_size=1, max_size=4))
def test_log_linear_is_the_renormalised_product_of_powers(seed, weights):
    log_probs = distributions(seed, len(weights))
    product = math.prod(lp.double().exp() ** w for w, lp in zip(weights, log_probs, strict=True))
    found = log_linear.combine(log_probs, torch.tensor(weights), log_linear.Settings())
    assert torch.allclose(found.double().exp(), normalised(product), rtol=1e-4, atol=1e-7)


def test_a_mixture_survives_a_members_zero_and_a_product_does_not():
    sure = torch.tensor([1.0, 0.0, 0.0]).log()
    open_ = torch.tensor([0.5, 0.25, 0.25]).log()
    half = torch.tensor([0.5, 0.5])
    assert torch.allclose(linear.combine([sure, open_], half, NO).exp(), torch.tensor([0.75, 0.125, 0.125]))
    assert log_linear.combine([sure, open_], half, log_linear.Settings()).exp().tolist() == [1.0, 0.0, 0.0]


def test_both_members_zero_stays_zero_and_its_gradient_is_zero():
    scores = torch.tensor([0.0, 1.0, -math.inf], requires_grad=True)
    mixed = linear.combine([scores.log_softmax(-1)] * 2, torch.tensor([0.3, 0.7]), NO)
    assert mixed[2] == -math.inf
    mixed[0].backward()
    assert torch.isfinite(scores.grad).all()


def test_a_mixture_is_exact_for_probabilities_too_small_for_float32():
    tiny = torch.tensor([0.0, -500.0])
    found = linear.combine([tiny, tiny], torch.tensor([0.5, 0.5]), NO)
    assert torch.allclose(found, tiny)


def test_weights_may_differ_from_place_to_place():
    log_probs = distributions(0, 2)
    weights = torch.rand(2, 3, 2).softmax(-1)
    expected = sum(weights[..., i : i + 1] * lp.exp() for i, lp in enumerate(log_probs))
    assert torch.allclose(linear.combine(log_probs, weights, NO).exp(), expected, atol=1e-6)


def test_experts_move_the_base_and_keep_to_its_nucleus():
    base, expert, anti = distributions(1, 3, ())
    options = experts.Settings(alpha=2.0, top_p=0.8)
    ranked = sorted(range(11), key=lambda token: -base[token])
    mass, kept = 0.0, []
    for token in ranked:
        if mass < 0.8:
            kept.append(token)
        mass += base[token].exp().item()
    scores = torch.zeros(11)
    for token in kept:
        scores[token] = (base[token] + 2 * (expert[token] - anti[token])).exp()
    weights = torch.tensor(experts.default(3, options))
    assert torch.allclose(experts.combine([base, expert, anti], weights, options).exp(), normalised(scores), atol=1e-6)


def test_contrastive_decoding_prefers_what_the_amateur_does_not_say_among_the_plausible():
    expert = torch.tensor([0.6, 0.35, 0.05]).log()
    amateur = torch.tensor([0.8, 0.1, 0.1]).log()
    found = contrastive.combine([expert, amateur], torch.tensor([1.0, -1.0]), contrastive.Settings(plausibility=0.1))
    assert torch.allclose(found.exp(), normalised(torch.tensor([0.75, 3.5, 0.0])))


def test_an_anti_expert_that_gives_zero_favours_a_token_finitely():
    expert, anti = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    found = log_linear.combine([expert, anti], torch.tensor([1.0, -0.5]), log_linear.Settings())
    assert torch.isfinite(found).all()
    assert found.argmax() == 1


@pytest.mark.parametrize(
    ("rule", "weights", "message"),
    [
        (linear, [0.5, 0.6], r"must sum to one.*1\.1; normalised they are \[0\.454545, 0\.545455\]"),
        (linear, [1.5, -0.5], "log_linear allows negative"),
        (log_linear, [-1.0, -0.5], "at least one weight above zero"),
        (experts, [1.0, 2.0], "base, expert, anti-expert"),
        (contrastive, [-1.0, 1.0], "an expert with a weight above zero"),
    ],
)
def test_weights_that_a_rule_cannot_use_are_refused(rule, weights, message):
    import re

    assert re.search(message, rule.problem(weights))


@pytest.mark.parametrize("rule", [linear, log_linear])
def test_equal_weights_are_the_default_and_copies_of_one_give_that_one(rule):
    (log_prob,) = distributions(5, 1)
    weights = torch.tensor(rule.default(3, rule.Settings()))
    assert torch.allclose(rule.combine([log_prob] * 3, weights, rule.Settings()), log_prob, atol=1e-5)
