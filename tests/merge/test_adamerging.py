"""AdaMerging against its twin, on models that have learned something."""

import data_twins as twins
import numpy as np
import pytest
import torch
from readers import KINDS, LENGTH, NAMES, ON, job, text_rows

import graft.merge._adamerging as adamerging
from graft import models
from graft.merge.adamerging import entropy


def lambdas_of(settings, reading_root, texts, tuned, out):
    made = job({"models": NAMES, "base": "base", "length": LENGTH} | settings, tuned, texts, reading_root, out)
    return made, made.settings


@pytest.mark.parametrize("by", ["model", "layer", "tensor"])
def test_lambdas_follow_the_gradient_of_the_entropy(by, merged, tuned):
    settings = {"method": "adamerging", "base": "base", "on": ON, "steps": 3, "learning_rate": 0.02, "by": by}
    made, notes, _ = merged(settings | {"batch_size": 12})
    base = models.load(tuned["base"], dtype=torch.float32).double()
    start = {name: value.detach() for name, value in base.named_parameters()}
    deltas = []
    for kind in KINDS:
        own = models.load(tuned[kind], dtype=torch.float32).double()
        deltas.append({name: value.detach() - start[name] for name, value in own.named_parameters()})
    groups = {name: adamerging.group_of(name, by) for name in start}
    found = {group: torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True) for group in groups.values()}
    assert len(found) == {"model": 1, "layer": 5, "tensor": len(start)}[by]
    adam = torch.optim.Adam(found.values(), lr=0.02)
    entropies = []
    for _ in range(3):
        adam.zero_grad()
        weights = twins.composed(start, deltas, lambda name: found[groups[name]])
        total = 0
        for kind in KINDS:
            ids = torch.stack(text_rows(kind))
            logits = torch.func.functional_call(base, weights, kwargs={"input_ids": ids}).logits[:, :-1]
            total = total + twins.entropy(logits).mean() / 3
        entropies.append(float(total))
        total.backward()
        adam.step()
    assert notes["entropy_by_step"] == pytest.approx(entropies, rel=1e-4)
    for group, expected in found.items():
        assert list(notes["lambdas"][group].values()) == pytest.approx(expected.tolist(), abs=2e-4), group
    weights = twins.composed(start, deltas, lambda name: found[groups[name]])
    for name, value in made.items():
        np.testing.assert_allclose(value.numpy(), weights[name].detach().numpy(), rtol=1e-3, atol=2e-4, err_msg=name)


def test_the_entropy_falls_and_without_steps_it_is_task_arithmetic(merged):
    settings = {"method": "adamerging", "base": "base", "on": "all", "start": 0.4}
    _, notes, _ = merged(settings | {"steps": 25, "learning_rate": 0.03}, "learned")
    assert np.mean(notes["entropy_by_step"][-5:]) < 0.8 * np.mean(notes["entropy_by_step"][:2])
    made, _, _ = merged(settings | {"steps": 0}, "start")
    plain, _, _ = merged({"method": "task_arithmetic", "base": "base", "scale": 0.4, "length": None}, "plain")
    assert all(torch.allclose(made[name], plain[name], atol=1e-6) for name in made)


def test_lambdas_stay_between_0_and_1_unless_told_otherwise(merged):
    settings = {"method": "adamerging", "base": "base", "on": ON, "steps": 4, "learning_rate": 0.5, "by": "model"}
    _, inside, _ = merged(settings, "inside")
    _, outside, _ = merged(settings | {"clamp": False}, "outside")
    assert all(0 <= value <= 1 for value in inside["lambdas"]["model"].values())
    assert any(not 0 <= value <= 1 for value in outside["lambdas"]["model"].values())


def test_the_entropy_is_its_formula():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entropy(logits), twins.entropy(logits.double()).float())


def test_what_does_not_fit_into_memory_is_read_again(merged, monkeypatch):
    settings = {"method": "adamerging", "base": "base", "on": ON, "steps": 2}
    held, _, _ = merged(settings, "held")
    monkeypatch.setattr("graft.merge._composed.HELD", 5000)
    read, _, _ = merged(settings, "read")
    assert all(torch.equal(held[name], read[name]) for name in held)
