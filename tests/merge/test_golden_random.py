"""Agreement with mergekit 0.1.5 where elements are dropped at random: with the masks that it drew, on its tensors, and
in the probabilities that they are drawn with; see bench/golden_random.py for how the file was made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from streaming import streamed

import graft.merge._drop
from graft.merge._random import uniform

GOLDEN = Path(__file__).parent / "golden" / "mergekit-0.1.5-random.safetensors"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""Both compute in float32, in another order; weights are around 0.02 to 1."""
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.4}
L1, PLAIN = {"rescale": "l1"}, {"rescale": "none"}
OURS = {
    "dare_linear": {"method": "dare_linear", "density": 0.4} | L1,
    "dare_linear_plain": {"method": "dare_linear", "density": 0.4} | PLAIN,
    "dare_linear_whole": {"method": "dare_linear", "density": 1.0},
    "dare_ties": {"method": "dare_ties", "density": 0.6} | L1,
    "dare_ties_mean": {"method": "dare_ties", "density": 0.6, "normalise": True, "scale": 0.7} | L1,
    "dare_ties_whole": {"method": "dare_ties", "density": 1.0},
    "della_linear": {"method": "della_linear", "density": 0.5, "epsilon": 0.2} | L1,
    "della_linear_whole": {"method": "della_linear", "density": 1.0},
    "della": {"method": "della", "density": 0.5, "epsilon": 0.2} | L1,
    "della_sum": {"method": "della", "density": 0.3, "epsilon": 0.1, "normalise": False, "scale": 1.3} | PLAIN,
    "della_whole": {"method": "della", "density": 1.0},
}
DRAWN = [name for name in OURS if not name.endswith("whole")]
KEPT, DROPPED = np.uint32(0), np.uint32(2**32 - 1)
"""Draws that keep an element, and that drop it, whatever its probability."""


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def parents(golden):
    """Model → {name: tensor}."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in golden.items():
        if key.startswith("input/"):
            _, model, tensor = key.split("/")
            found.setdefault(model, {})[tensor] = value
    return found


def of(golden, name, what):
    """`what` of a case by (model, tensor), or by (tensor,) for what was merged."""
    split = {tuple(key.split("/")): value for key, value in golden.items()}
    return {key[2:]: value for key, value in split.items() if key[:2] == (name, what)}


def by_rank(values, delta):
    """Of an element's values those of the ranks of its row, smallest magnitude first, flat."""
    rows = delta.reshape(-1, delta.shape[-1])
    order = rows.abs().sort(dim=1, stable=True).indices
    return values.reshape(rows.shape).gather(1, order).flatten()


def in_order_of_draws(name, values, delta):
    """DARE draws for elements, DELLA for the ranks in a row."""
    return (by_rank(values, delta) if name.startswith("della") else values.flatten()).numpy()


def test_every_case_of_the_file_is_compared(golden):
    with safe_open(GOLDEN, "pt") as file:
        assert set(OURS) == set(json.loads(file.metadata()["cases"]))
    assert all(of(golden, name, "mask") for name in DRAWN)


@pytest.mark.usefixtures("many_pieces")
@pytest.mark.parametrize("name", OURS)
def test_agrees_with_mergekit_where_it_drops_the_same_elements(name, golden, parents, tmp_path, monkeypatch):
    masks = of(golden, name, "mask")

    def drawn(seed, tensor, model, start, count):
        delta = parents[model][tensor] - parents["base"][tensor]
        kept = in_order_of_draws(name, masks[model, tensor], delta)
        return np.where(kept, KEPT, DROPPED)[start : start + count]

    monkeypatch.setattr(graft.merge._drop, "uniform", drawn)
    made = streamed(OURS[name] | {"base": "base", "models": WEIGHTS}, parents, tmp_path)
    theirs = of(golden, name, "merged")
    assert {(tensor,) for tensor in made} == theirs.keys()
    for (tensor,), values in theirs.items():
        torch.testing.assert_close(made[tensor], values, **TOLERANCE, msg=lambda m, t=tensor: f"{t}: {m}")


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_sum"])
def test_elements_are_dropped_as_often_and_independently(name, golden, parents):
    """Over 300 seeds: squared deviations of the counts from mergekit's probabilities add up to what chance gives."""
    draws, settings = 300, OURS[name]
    squares, elements = 0.0, 0
    for (model, tensor), shares in of(golden, name, "share").items():
        delta = parents[model][tensor] - parents["base"][tensor]
        wanted = in_order_of_draws(name, shares, delta).astype(np.float64)
        if name.startswith("della"):
            ranks = graft.merge._drop._Ranks.of(delta.shape[-1], settings["density"], settings["epsilon"], "none")
            limits = np.tile(ranks.limits.astype(np.float64), delta.numel() // delta.shape[-1])
            np.testing.assert_allclose(limits / 2**32, wanted, rtol=1e-6)
        else:
            limits = np.full(delta.numel(), settings["density"] * 2.0**32)
        kept = sum(uniform(seed, tensor, model, 0, delta.numel()) < limits for seed in range(draws))
        squares += float((((kept - draws * wanted) ** 2) / (draws * wanted * (1 - wanted))).sum())
        elements += delta.numel()
    # chi-squared with so many degrees of freedom: five standard deviations
    assert abs(squares - elements) < 5 * (2 * elements) ** 0.5
