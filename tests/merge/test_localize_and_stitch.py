"""Localize-and-Stitch against its twins: regions by size, and regions that are learned."""

import numpy as np
import pytest
import readers
import torch
from readers import KINDS, LENGTH, NAMES, ON, job, text_rows
from safetensors.torch import load_file
from small_family import tensors
from streaming import relatives, streamed

import graft
import graft.merge._localizing as localizing
import graft.merge.stream
from graft import models
from graft.merge._composed import Composed


def stitched_twin(parents, densities, weights):
    """The largest of each task vector over all tensors, ties by place; the weighted mean where regions overlap."""
    names = sorted(parents["base"])
    total, share = 0, 0
    for model, density, weight in zip("abc", densities, weights, strict=True):
        flat = np.concatenate([(parents[model][n] - parents["base"][n]).double().numpy().ravel() for n in names])
        mask = np.zeros(len(flat))
        mask[np.argsort(-np.abs(flat.astype(np.float32)), kind="stable")[: int(density * len(flat))]] = 1
        total, share = total + weight * mask * flat, share + weight * mask
    made = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    sizes = np.cumsum([parents["base"][n].numel() for n in names])[:-1]
    return {n: part.reshape(parents["base"][n].shape) for n, part in zip(names, np.split(made, sizes), strict=True)}


def test_stitching_the_largest_changes_is_its_formula(tmp_path, monkeypatch):
    monkeypatch.setattr(graft.merge.stream, "PIECE", 20)
    parents = relatives(3)
    weights, densities = {"a": 0.5, "b": 1.0, "c": 1.2}, {"a": 0.2, "b": 0.5, "c": 0.7}
    settings = {"method": "localize_and_stitch", "base": "base", "models": weights, "density": densities, "scale": 0.8}
    made = streamed(settings, parents, tmp_path)
    expected = stitched_twin(parents, densities.values(), weights.values())
    for name, value in made.items():
        change = (value - parents["base"][name]).double().numpy()
        np.testing.assert_allclose(change, 0.8 * expected[name], rtol=1e-4, atol=1e-6)


def test_equal_models_are_stitched_to_that_model_and_the_order_does_not_matter(tmp_path):
    parents = relatives(3)
    settings = {"method": "localize_and_stitch", "base": "base", "models": ["a", "b", "c"], "density": 0.3}
    one = streamed(settings, parents, tmp_path)
    other = streamed(settings | {"models": ["c", "a", "b"]}, parents, tmp_path)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    parents["b"] = parents["c"] = parents["a"]
    whole = streamed(settings | {"density": 1.0}, parents, tmp_path)
    assert all(torch.allclose(whole[name], parents["a"][name], atol=1e-6) for name in whole)


LEARN = {"method": "localize_and_stitch", "base": "base", "on": ON, "density": 0.1, "batch_size": 12, "bias": 3.0}


def test_regions_follow_the_gradient_of_the_loss(reading_root, texts, tuned, tmp_path):
    settings = LEARN | {"models": NAMES, "length": LENGTH, "steps": 2, "learning_rate": 2e3, "l1": 1e-3}
    made = job(settings, tuned, texts, reading_root, tmp_path / "out")
    with Composed(made, made.settings) as composed:
        cuts = localizing.largest_of(composed, made.settings)
        start = {parameter: found[1] for parameter, found in cuts.items()}
        found = localizing.localized(composed, made, made.settings, "middle", start)
    base = models.load(tuned["base"], dtype=torch.float32).double()
    own = models.load(tuned["middle"], dtype=torch.float32).double()
    weights = {name: value.detach() for name, value in base.named_parameters()}
    delta = {name: value.detach() - weights[name] for name, value in own.named_parameters()}
    flat = torch.cat([d.abs().flatten() for d in delta.values()])
    least = flat.sort(descending=True).values[int(0.1 * len(flat)) - 1]
    scores = {name: torch.where(d.abs() >= least, 3.0, -3.0).double().requires_grad_() for name, d in delta.items()}
    ids = torch.stack(text_rows("middle"))
    for _ in range(2):
        mixed = {name: weights[name] + score.sigmoid() * delta[name] for name, score in scores.items()}
        loss = torch.func.functional_call(base, mixed, kwargs={"input_ids": ids, "labels": ids}).loss
        loss = loss + 1e-3 * sum(score.sigmoid().sum() for score in scores.values())
        slopes = torch.autograd.grad(loss, list(scores.values()))
        scores = {
            name: (score - 2e3 * slope).detach().requires_grad_()
            for (name, score), slope in zip(scores.items(), slopes, strict=True)
        }
    for name, score in scores.items():
        np.testing.assert_allclose(found[name].numpy(), score.detach().numpy(), rtol=5e-3, atol=2e-2, err_msg=name)


def test_learned_regions_are_stitched(merged, tuned):
    made, notes, folder = merged(LEARN | {"steps": 3, "learning_rate": 1e4})
    regions = {k: load_file(folder.parent / "out.scratch" / "regions" / str(i) / "model.safetensors")
               for i, k in enumerate(KINDS)}  # fmt: skip
    for kind, found in regions.items():
        share = sum(int(mask.sum()) for mask in found.values()) / sum(mask.numel() for mask in found.values())
        assert notes["share_in_region"][kind] == pytest.approx(share)
    base = tensors(tuned["base"])
    for name, value in made.items():
        masks = [regions[kind][name].double() for kind in KINDS]
        deltas = [(tensors(tuned[kind])[name] - base[name]).double() for kind in KINDS]
        total = sum(m * d for m, d in zip(masks, deltas, strict=True)) / sum(masks).clamp(min=1)
        torch.testing.assert_close(value.double(), base[name].double() + total, rtol=1e-4, atol=1e-6)


def test_learning_a_region_makes_it_better_at_its_text_and_l1_makes_it_smaller(merged):
    alone = {"models": ["low"], "on": "low"}
    _, _, start = merged(LEARN | alone | {"steps": 0}, "start")
    _, grown, learned = merged(LEARN | alone | {"steps": 20, "learning_rate": 1e4}, "learned")
    _, small, _ = merged(LEARN | alone | {"steps": 20, "learning_rate": 1e4, "l1": 1e-4}, "small")
    assert readers.loss(learned, "low") < readers.loss(start, "low")
    assert small["share_in_region"]["low"] < grown["share_in_region"]["low"]
