"""Votes, classifiers together, and the answer that risks least: by hand and against direct computation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.ensemble.voting import classify, least_risk, majority, ranked


def test_most_votes_win_and_weights_count():
    assert majority(["a", "b", "b"]) == "b"
    assert majority(["a", "b", "b"], [3, 1, 1]) == "a"
    assert majority(["b", "a"]) == "b"
    with pytest.raises(ValueError, match="each of 2 members, found"):
        majority(["a", "b"], [1])


def test_bordas_count_by_hand():
    # a: 2 + 0 + 1, b: 1 + 2 + 2, c: 0 + 1 + 0
    assert ranked([["a", "b", "c"], ["b", "c", "a"], ["b", "a", "c"]]) == ["b", "a", "c"]
    # what a member leaves out shares the places behind: a 2 + 0.5, b 0.5 + 2, c 0.5 + 0.5; b counts twice
    assert ranked([["a"], ["b"], ["c", "a", "b"]], [1, 2, 1]) == ["b", "a", "c"]


@given(st.permutations("abcd"), st.integers(1, 5))
def test_members_that_agree_are_one_member(order, members):
    assert ranked([order] * members) == order


def overlap(text, other):
    return len(set(text) & set(other)) / max(1, len(set(text) | set(other)))


@given(st.lists(st.text("abcd", min_size=1, max_size=4), min_size=1, max_size=6))
def test_the_chosen_text_has_the_highest_expected_gain(texts):
    chosen = least_risk(texts, overlap)
    gains = [sum(overlap(text, other) for other in texts) for text in texts]
    assert gains[chosen] == max(gains)


def test_references_and_weights_decide_what_is_expected():
    assert least_risk(["ab", "cd"], overlap, references=["abx", "cdy"], weights=[1, 3]) == 1


def probs(seed=0, members=3, items=5, classes=4):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), (members, items))


def test_classifiers_together_are_their_mixture_product_and_votes():
    told, weights = probs(), [0.5, 0.3, 0.2]
    mixed = np.einsum("m,mic->ic", weights, told)
    assert np.allclose(np.exp(classify(np.log(told), weights)), mixed, atol=1e-6)
    product = np.prod(told ** np.array(weights)[:, None, None], 0)
    product /= product.sum(-1, keepdims=True)
    assert np.allclose(np.exp(classify(np.log(told), weights, "log_linear")), product, atol=1e-6)
    for item, row in itertools.product(range(5), ["majority", "ranked"]):
        found = int(classify(np.log(told), weights, row)[item].argmax())
        orders = [list(np.argsort(-member[item])) for member in told]
        expected = majority([o[0] for o in orders], weights) if row == "majority" else ranked(orders, weights)[0]
        assert found == expected


def test_rules_and_weights_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="found 'mean'"):
        classify(probs(), [1, 1, 1], "mean")
    with pytest.raises(ValueError, match="must sum to one"):
        classify(probs(), [1, 1, 1])


def test_classes_that_are_equally_likely_share_their_places():
    even = np.log([[[0.25, 0.25, 0.25, 0.25]], [[0.4, 0.4, 0.1, 0.1]]])
    # of six points: 1.5 each; 2.5, 2.5, 0.5, 0.5
    assert np.exp(classify(even[:1], [1.0], "ranked")) == pytest.approx(np.full((1, 4), 0.25))
    assert np.exp(classify(even, [0.5, 0.5], "ranked")) == pytest.approx(np.array([[2, 2, 1, 1]]) / 6)
    assert np.exp(classify(even[:1], [1.0], "majority")) == pytest.approx(np.array([[1, 0, 0, 0]]))
