"""Fisher merging against its twin, on models that have learned something."""

import data_twins as twins
import numpy as np
import pytest
import torch
from readers import KINDS, ON, mean, text_rows
from small_family import tensors
from transformers import GPT2Config, GPT2LMHeadModel

import graft.merge._fisher as fisher
from graft import models
from graft.merge.fisher import fisher_mean


def test_the_mean_weighed_by_fisher_information_is_its_formula():
    draw = np.random.default_rng(0)
    values, informations = draw.normal(size=(3, 7)), draw.exponential(size=(3, 7))
    informations[:, 2] = 0
    held = np.maximum(informations, 1e-3) * np.array([0.5, 1, 2])[:, None]
    made = fisher_mean(*([torch.tensor(x).float() for x in each] for each in (values, informations)), [0.5, 1, 2], 1e-3)
    np.testing.assert_allclose(made.numpy(), (held * values).sum(0) / held.sum(0), rtol=1e-5)


def test_fisher_information_is_the_mean_square_of_the_gradients_of_rows(tuned):
    model = models.load(tuned["low"], dtype=torch.float32)
    read = [{"input_ids": row[None], "labels": row[None].clone()} for row in text_rows("low")[:4]]
    found = fisher.diagonal(model, read, "data", 0, 100)
    for name, expected in twins.fisher(model, text_rows("low")[:4]).items():
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=2e-3, atol=1e-9, err_msg=name)


def test_tokens_that_the_model_draws_give_the_exact_fisher_information_on_average():
    model = tiny()
    row = torch.tensor([3, 1, 4, 1, 5, 2])
    exact = twins.exact_fisher(model, row)
    read = [{"input_ids": row[None], "labels": row[None].clone()}] * 200
    drawn = fisher.diagonal(model, read, "sampled", 1, 1)
    again = fisher.diagonal(model, read, "sampled", 1, 1)
    other = fisher.diagonal(model, read, "data", 1, 1)
    whole = sum(e.sum() for e in exact.values())
    # 200 draws of a quantity about as wide as it is large: a standard deviation of 7 % or so
    assert sum(float(d.sum()) for d in drawn.values()) == pytest.approx(whole, rel=0.25)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert abs(sum(float(d.sum()) for d in other.values()) / whole - 1) > 0.3


def tiny():
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=6, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("normalise", [True, False])
def test_fisher_merging_is_its_formula(normalise, merged, tuned):
    settings = {"method": "fisher", "on": ON, "normalise": normalise, "floor": 1e-2}
    made, notes, _ = merged(settings | {"models": {"low": 1.0, "middle": 0.5, "high": 2.0}})
    found = {kind: twins.fisher(models.load(tuned[kind], dtype=torch.float32), text_rows(kind)) for kind in KINDS}
    means = {kind: np.mean(np.concatenate([f.ravel() for f in each.values()])) for kind, each in found.items()}
    assert notes["mean_fisher_information"] == pytest.approx(means, rel=1e-3)
    whole = np.mean(list(means.values()))
    assert made.keys() == tensors(tuned["low"]).keys()
    for name, value in made.items():
        weights = [
            w * np.maximum(found[kind][name] / (means[kind] if normalise else whole), 1e-2)
            for kind, w in zip(KINDS, (1.0, 0.5, 2.0), strict=True)
        ]
        values = [tensors(tuned[kind])[name].double().numpy() for kind in KINDS]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        np.testing.assert_allclose(value.numpy(), expected, rtol=2e-3, atol=2e-5, err_msg=name)


def test_a_floor_that_nothing_reaches_makes_fisher_merging_the_mean(merged, tuned):
    made, _, _ = merged({"method": "fisher", "on": "all", "floor": 1e12})
    assert made.keys() == tensors(tuned["low"]).keys()
    for name, value in made.items():
        np.testing.assert_allclose(value.numpy(), mean(tuned, name), rtol=1e-5, atol=1e-6)
