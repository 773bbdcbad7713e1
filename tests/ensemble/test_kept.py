"""What is kept for fitting without models: exact where all tokens are kept, else by direct enumeration."""

import numpy as np
import pytest
import torch
from test_ensemble_folder import facts, family, lines, made, run  # noqa: F401
from test_weights import reads

from graft.ensemble import VERB
from graft.ensemble.gate import features
from graft.ensemble.kept import columns_of, kept_of
from graft.ensemble.weights import fit_log_linear

TOKENS, WORDS = 60, 23


def kept(top_k, members=3, seed=0):
    log_probs, gold = reads(seed, members, TOKENS, WORDS)
    return log_probs, gold, [kept_of(each, gold, torch.zeros(TOKENS), top_k=top_k) for each in log_probs]


def spread(log_probs, gold, top_k):
    """A member's distribution with all but its likeliest tokens and the one that comes given the same."""
    found = log_probs.double().exp()
    for row, token in zip(found, gold.tolist(), strict=True):
        known = {*row.argsort(descending=True)[:top_k].tolist(), token}
        rest = [other for other in range(WORDS) if other not in known]
        row[rest] = row[rest].mean()
    return found.log()


@pytest.mark.parametrize("top_k", [1, 4, 11])
def test_columns_are_the_distributions_with_an_even_tail(top_k):
    log_probs, gold, parts = kept(top_k)
    found = columns_of(parts, WORDS)
    whole = [spread(each, gold, top_k) for each in log_probs]
    weights = torch.tensor([0.7, 0.6, -0.4], dtype=torch.float64)
    scores = sum(w * each.double() for w, each in zip(weights, found.log_probs, strict=True)) + found.log_counts
    expected = sum(w * each for w, each in zip(weights, whole, strict=True))
    assert torch.allclose(scores.logsumexp(-1), expected.logsumexp(-1), atol=1e-5)
    given = torch.stack([each.gather(1, found.place[:, None])[:, 0] for each in found.log_probs])
    assert torch.allclose(given, torch.stack([each.gather(1, gold[:, None])[:, 0] for each in log_probs]))
    assert torch.allclose(found.log_counts.exp().sum(1), torch.full((TOKENS,), float(WORDS)))


def test_all_tokens_kept_give_the_weights_of_whole_distributions_and_fewer_come_near():
    log_probs, gold, _ = kept(1)
    whole = fit_log_linear(log_probs, gold)
    errors = []
    for top_k in (2, 6, WORDS, 100):
        found = columns_of(kept(top_k)[2], WORDS)
        fit = fit_log_linear(found.log_probs, found.place, log_counts=found.log_counts)
        errors.append(np.abs(fit.weights - whole.weights).max())
        assert np.allclose(fit.members, whole.members, atol=1e-6)
    assert errors[2] < 1e-5
    assert errors[3] < 1e-5
    assert errors[1] < errors[0]


def test_what_a_gate_looks_at_is_kept_as_features():
    log_probs, gold, parts = kept(None, 2)
    seen = torch.cat([each.seen for each in parts], -1)
    assert torch.equal(seen, features(log_probs))
    assert torch.equal(parts[0].log_probs, log_probs[0].gather(1, gold[:, None])[:, 0])
    assert parts[0].top is None


def test_a_product_is_fitted_from_the_likeliest_tokens_of_its_members(family):  # noqa: F811
    sets = {"text": lines(family / "text.jsonl", 40)}
    raw = {"combine": "log_linear", "members": ["llama", "gpt2", "mistral"]}
    _, whole = run(family, {**raw, "weights": {"fit": "text.dev"}}, sets, name="whole")
    _, all_kept = run(family, {**raw, "weights": {"fit": "text.dev", "top_k": 100}}, sets, name="all")
    target, few = run(family, {**raw, "weights": {"fit": "text.dev", "top_k": 8}}, sets, name="few")
    assert list(all_kept["weights"].values()) == pytest.approx(list(whole["weights"].values()), abs=1e-4)
    assert few["member_losses"] == pytest.approx(whole["member_losses"], abs=1e-5)
    assert few["weights"] != whole["weights"]
    assert (target / "config.json").is_file()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "found it with linear"),
        ({"combine": "log_linear", "vocabulary": "bytes"}, "found it over bytes"),
    ],
)
def test_only_products_of_many_tokens_keep_the_likeliest(family, raw, words):  # noqa: F811
    settings = VERB.parse({"members": ["llama", "gpt2"], "weights": {"fit": "text.dev", "top_k": 4}, **raw})
    assert any(words in problem for problem in VERB.check(settings, facts(family, "llama", "gpt2")))
