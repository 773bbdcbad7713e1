"""The short verdict that merges ask for, beside the whole one."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from graft.checkpoint import TensorReader
from graft.kinship import evidence, statistics
from graft.kinship.evidence import kin, weigh

SHAPES = {"q_proj": (32, 32), "up_proj": (48, 32), "gate_proj": (48, 32), "down_proj": (32, 48)}


def weights(seed, layers=3):
    draw = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=draw)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }


def near(made, step, seed=9):
    draw = torch.Generator().manual_seed(seed)
    return {name: weight + step * torch.randn(weight.shape, generator=draw) for name, weight in made.items()}


def shuffled(made, kind="up_proj"):
    """The rows of one kind of matrix in another order."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    return {name: weight[order].contiguous() if kind in name else weight for name, weight in made.items()}


PAIRS = {
    "tuned": (weights(0), near(weights(0), 0.05), "related"),
    "far": (weights(0), near(weights(0), 1.0), "related"),
    "channels": (weights(0), shuffled(near(weights(0), 0.05)), "permuted"),
    "strangers": (weights(0), weights(1), "unrelated"),
    "nothing shared": (weights(0), {"other.weight": torch.zeros(4, 4)}, "incomparable"),
}


def opened(folder, made):
    folder.mkdir()
    save_file(made, folder / "model.safetensors")
    return TensorReader(folder)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_short_verdict_is_the_whole_one(pair, tmp_path):
    a, b, found = PAIRS[pair]
    with opened(tmp_path / "a", a) as first, opened(tmp_path / "b", b) as second:
        short, whole = kin(first, second, same_tokens=True), weigh(first, second, same_tokens=True)
    assert (short.found, whole.found) == (found, found)
    assert short.mean_is_a_model == (found in ("related", "incomparable"))
    if whole.test is not None:
        assert short.test.value == pytest.approx(whole.test.value, abs=0.05)


def test_close_relatives_are_settled_without_the_whole_test(tmp_path, monkeypatch):
    a, b, _ = PAIRS["tuned"]
    monkeypatch.setattr(evidence, "weigh", None)
    with opened(tmp_path / "a", a) as first, opened(tmp_path / "b", b) as second:
        assert kin(first, second, same_tokens=True).test.p == 0.001


def test_of_a_trace_of_a_common_start_no_mean_is_a_model(tmp_path):
    a = weights(0, layers=8)
    with opened(tmp_path / "a", a) as first, opened(tmp_path / "b", near(a, 15.0)) as second:
        found = kin(first, second, same_tokens=True)
    assert (found.found, found.mean_is_a_model) == ("related", False)
    assert found.test.value < evidence.TRACE


def test_shuffles_in_pieces_are_orders_each_of_them_whole(monkeypatch):
    monkeypatch.setattr(statistics, "AT_ONCE", 64)
    orders = np.concatenate(list(statistics._orders(8, 30, seed=1)))
    assert orders.shape == (30, 8)
    assert (np.sort(orders, axis=1) == np.arange(8)).all()
    assert len(np.unique(orders, axis=0)) == 30
