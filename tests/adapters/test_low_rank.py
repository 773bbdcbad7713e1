"""The operations behind low-rank points: their gradients, and where h is changed in place."""

import pytest
import torch
from torch import nn

from graft.adapters import adopt, junction, low_rank
from graft.adapters.low_rank import added, bare, beside
from graft.settings import parse
from graft.tune import lora

from .families import family, inputs, moved


def test_gradients_of_low_rank_points_are_those_of_their_formula():
    torch.manual_seed(0)
    h, x, down, up = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (7, 6), (2, 6), (5, 2))
    )
    assert torch.autograd.gradcheck(lambda *given: added(*given, 0.7), (h, x, down, up))
    torch.testing.assert_close(added(h, x, down, up, 0.7), h + 0.7 * x @ down.T @ up.T)
    for frozen in ((x,), (down, x), (up,), (h, x)):  # what is frozen has no gradient, the rest the same one
        wanted = [p for p in (h, x, down, up) if all(p is not q for q in frozen)]
        given = [p if any(p is q for q in wanted) else p.detach() for p in (h, x, down, up)]
        weight = torch.randn(7, 5, dtype=torch.float64)
        found = torch.autograd.grad((added(*given, 0.7) * weight).sum(), wanted)
        plain = torch.autograd.grad(((given[0] + 0.7 * given[1] @ given[2].T @ given[3].T) * weight).sum(), wanted)
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [2, 40])  # the change is added to the gradient, or to the weight
def test_gradients_beside_a_linear_layer_are_those_of_the_sum(rows):
    torch.manual_seed(0)
    shapes = ((rows, 1, 6), (2, 6), (5, 2))
    x, down, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight = torch.randn(5, 6, dtype=torch.float64)

    def made(x, down, up):
        return beside(nn.functional.linear(x, weight).detach(), x, weight, down, up, 0.7)

    torch.testing.assert_close(made(x, down, up), x @ (weight + 0.7 * up @ down).T)
    for wanted in ((x, down, up), (down,), (up,), (x,), (down, up)):
        given = [p if any(p is q for q in wanted) else p.detach() for p in (x, down, up)]
        found = torch.autograd.grad(made(*given).square().sum(), wanted)
        plain = torch.autograd.grad((given[0] @ (weight + 0.7 * given[2] @ given[1]).T).square().sum(), wanted)
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other)


def test_a_change_is_not_added_to_weights_in_half_precision():
    assert low_rank._worth_adding(40, torch.zeros(5, 6))
    assert not low_rank._worth_adding(40, torch.zeros(5, 6, dtype=torch.bfloat16))


def gradients(model):
    """By name, of the sum of squares of the logits."""
    model.zero_grad()
    model(**inputs(model)).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_lora(**options):
    model = family("llama").train()
    adopt(model, lora.points(parse(lora.Settings, {"rank": 3, "on": ["query", "down"], **options})))
    moved(model, 0.5)
    return model


def counted(monkeypatch):
    """How often h was changed in place, in a list."""
    calls = []
    monkeypatch.setattr(junction, "beside", lambda *given: (calls.append(1), beside(*given))[1])
    return calls


def test_in_place_is_as_good_as_apart(monkeypatch):
    model, calls = with_lora(), counted(monkeypatch)
    found = gradients(model)
    assert len(calls) == 4  # two layers, two places
    monkeypatch.setattr(junction, "bare", lambda *_: False)
    plain = gradients(model)
    assert len(calls) == 4
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5)


def test_who_looks_at_a_layer_before_sees_it_as_it_was(monkeypatch):
    model, calls, seen = family("llama").train(), counted(monkeypatch), {}
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0].detach(), h=output))
    adopt(model, lora.points(parse(lora.Settings, {"rank": 3, "on": ["query"]})))
    moved(model, 0.5)
    gradients(model)
    assert len(calls) == 1  # the other layer
    assert torch.equal(seen["h"], nn.functional.linear(seen["x"], layer.weight))


@pytest.mark.parametrize("case", ["dropout", "two adapters", "the layer is trained"])
def test_in_place_only_where_nothing_else_is_wanted(case, monkeypatch):
    model, calls = with_lora(**{"dropout": 0.5} if case == "dropout" else {}), counted(monkeypatch)
    if case == "two adapters":
        adopt(model, lora.points(parse(lora.Settings, {"rank": 2, "on": ["query", "down"]})), "second")
    if case == "the layer is trained":
        model.requires_grad_(True)
    found = gradients(model)
    assert not calls
    assert case != "the layer is trained" or "model.layers.0.self_attn.q_proj.weight" in found


def test_only_a_frozen_linear_layer_in_full_is_bare():
    layer, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4)
    h = layer(x)
    assert bare(layer, x, h)
    assert not bare(layer, x.half(), h)
    assert not bare(layer, x, torch.randn(3, 2).t())
    assert not bare(nn.Identity(), x, h)
    layer.bias.requires_grad_(True)
    assert not bare(layer, x, h)
    assert not bare(layer.requires_grad_(False).half(), x, h)
    layer.float().weight.ds_id = 1  # as DeepSpeed marks what it spreads
    assert not bare(layer, x, h)
