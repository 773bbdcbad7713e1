"""Products by the quicker library: the same numbers and gradients, only where they may be taken, and not for longer."""

import copy
import threading

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graft import machine, products
from graft.products import product, quick_layers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here")
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""Sums of up to 48 numbers of size one, added up in another order."""


@pytest.fixture
def quick(monkeypatch):
    """oneDNN is taken for products of every size, on any processor; calls of it are counted in a list."""
    calls, plain = [], products._by_onednn
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "quicker", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", lambda *given: (calls.append(1), plain(*given))[1])
    return calls


def test_products_are_those_of_the_formula(quick):
    torch.manual_seed(0)
    for a in (torch.randn(7, 48), torch.randn(48, 5).t()):
        for b in (torch.randn(48, 9), torch.randn(9, 48).t()):
            expected = (a.double() @ b.double()).float()
            torch.testing.assert_close(product(a, b), expected, **ROUNDING)
    assert len(quick) == 4


LAYERS = {
    "with bias": lambda: nn.Linear(48, 9),
    "without": lambda: nn.Linear(48, 9, bias=False),
    "transposed": lambda: Conv1D(9, 48),
}


def taught(layer, x, upstream):
    """Output and gradients of x and all weights (None for what is frozen)."""
    layer.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    out = layer(x)
    if out.requires_grad:
        (out * upstream).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("frozen", ["nothing", "weights", "x", "all"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_layers_give_the_same_numbers_and_gradients(quick, kind, frozen):
    torch.manual_seed(0)
    layer = LAYERS[kind]().requires_grad_(frozen not in ("weights", "all"))
    x = torch.randn(2, 5, 48, requires_grad=frozen not in ("x", "all"))
    upstream = torch.randn(2, 5, 9)
    expected = taught(layer, x, upstream)
    assert not quick
    with quick_layers():
        found = taught(layer, x, upstream)
    assert len(quick) == 1 + sum(grad is not None and grad.ndim > 1 for grad in expected[1:])
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, **ROUNDING)
            assert one.stride() == other.stride()


def held(layer, x):
    """Sizes of what is kept for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        layer(x)
    return sum(sizes)


def test_nothing_more_is_held_than_without(quick):
    x, frozen = torch.randn(20, 48, requires_grad=True), nn.Linear(48, 9).requires_grad_(False)
    with quick_layers():
        assert held(frozen, x) == 48 * 9  # the weight, for the gradient of x
        assert held(nn.Linear(48, 9), x.detach()) == 20 * 48
    assert quick


def test_outputs_may_be_changed_in_place(quick):
    layer, x = nn.Linear(48, 9), torch.randn(2, 5, 48)
    with quick_layers():
        layer(x).mul_(2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * x.sum((0, 1)).expand(9, 48), **ROUNDING)


def test_gradients_may_be_derived_again(quick):
    layer = nn.Linear(48, 9)
    x = torch.randn(5, 48, requires_grad=True)

    def second():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), layer.weight)[0]

    expected = second()
    with quick_layers():
        torch.testing.assert_close(second(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_plain_product_is_left_alone(quick):
    layer, x = nn.Linear(48, 9), torch.randn(5, 48)
    with quick_layers(), torch.no_grad():
        assert copy.deepcopy(layer).double()(x.double()).dtype is torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(layer)(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (5, 9)
        with torch.backends.mkldnn.flags(enabled=False):
            layer(x)
    assert not quick


def test_small_products_stay_where_they_are(quick, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 5 * 48 * 9)
    layer = nn.Linear(48, 9)
    with quick_layers(), torch.no_grad():
        layer(torch.randn(4, 48))
        assert not quick
        layer(torch.randn(5, 48))
        assert quick


def test_layers_are_as_they_were_behind_the_last_one_inside(quick):
    plain = nn.Linear.forward, Conv1D.forward
    inside, done = threading.Event(), threading.Event()

    def other():
        with quick_layers():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    with quick_layers(), quick_layers():
        thread.start()
        inside.wait(10)
    assert nn.Linear.forward is not plain[0]
    done.set()
    thread.join()
    assert (nn.Linear.forward, Conv1D.forward) == plain


@pytest.mark.parametrize(("maker", "width"), [("GenuineIntel", "AVX512"), ("AuthenticAMD", "AVX2"), ("", "AVX512")])
def test_other_processors_keep_their_library(monkeypatch, maker, width):
    monkeypatch.setattr(products, "maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert not products.quicker.__wrapped__()


def test_the_processor_says_who_made_it(monkeypatch, tmp_path):
    said = tmp_path / "cpuinfo"
    said.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: some\n")
    monkeypatch.setattr(machine, "PROCESSORS", said)
    assert machine.maker() == "AuthenticAMD"
    said.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")  # as on ARM
    assert machine.maker() == ""
    monkeypatch.setattr(machine, "PROCESSORS", tmp_path / "none")
    monkeypatch.setattr(machine.platform, "processor", lambda: "Intel64 Family 6 Model 142 Stepping 10, GenuineIntel")
    assert machine.maker() == "GenuineIntel"
