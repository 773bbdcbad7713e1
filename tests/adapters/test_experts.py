"""LoRA on experts that lie in one parameter: what it computes is what the sum of weight and change would."""

import copy

import pytest
import torch
from torch.func import functional_call

from graft import models
from graft.adapters import adapters_of, adopt, expert_weight, fold
from graft.adapters.expert_weight import ExpertWeight
from graft.adapters.folding import save_folded
from graft.adapters.forms import ExpertLowRank
from graft.adapters.places import Layout
from graft.errors import RequestError, SettingsError

from .families import family, inputs, logits, moved
from .mixtures import CHOOSE, MIXTURES, mixture
from .test_space import point, points

RANK = 3
"""No multiple of what grouped products want."""
EVERY_WAY = [(name, how) for name in CHOOSE for how in ("eager", "batched_mm", "grouped_mm")]
EVERY_WAY += [(name, None) for name in MIXTURES if name not in CHOOSE]


def lora(on=("experts",), **more):
    return points("lora", **{"rank": RANK, "alpha": 6, "on": list(on)} | more)


def sites(model, name="adapter"):
    return [site for site in adapters_of(model).sites[name].values() if isinstance(site, ExpertLowRank)]


def loss(out):
    return out.logits.square().sum()


def change(site, down, up):
    """s · up · down of every expert, in the layout of its parameter, without what the package has for it."""
    turned = torch.einsum("eor,eri->eio" if site.place.turned else "eor,eri->eoi", up, down)
    return site.scale * turned.reshape(site.weight().shape)


def brute(name, how, found):
    """Logits with weights that are sums, and the gradients of the factors, of a model without adapters."""
    twin, factors, held = mixture(name, how), {}, {}
    for site in found:
        down, up = (tensor.detach().clone().requires_grad_() for tensor in (site.down, site.up))
        factors[site.place.path] = down, up
        held[site.place.path] = twin.get_parameter(site.place.path).detach() + change(site, down, up)
    out = functional_call(twin, held, kwargs=inputs(twin))
    loss(out).backward()
    return out.logits.detach(), {path: (down.grad, up.grad) for path, (down, up) in factors.items()}


@pytest.mark.parametrize(("name", "how"), EVERY_WAY)
def test_products_are_those_of_the_sum_and_start_as_the_identity(name, how, monkeypatch):
    model = mixture(name, how)
    before, frozen = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    adopt(model, lora())
    assert torch.equal(logits(model), before)
    moved(model)
    expected, gradients = brute(name, how, sites(model))
    # the sum is never made
    monkeypatch.setattr(expert_weight, "summed", None)
    out = model(**inputs(model))
    loss(out).backward()
    assert torch.allclose(out.logits, expected, atol=2e-5)
    assert (expected - before).abs().max() > 0.05
    assert gradients
    for site in sites(model):
        for found, wanted in zip((site.down.grad, site.up.grad), gradients[site.place.path], strict=True):
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max())
    assert all(torch.equal(value, frozen[key]) for key, value in model.state_dict().items() if key in frozen)
    others = (p for n, p in model.named_parameters() if not n.startswith("graft_adapters."))
    assert all(parameter.grad is None for parameter in others)


@pytest.mark.parametrize("name", list(MIXTURES))
def test_sizes_are_told_whichever_way_round_experts_lie(name):
    model = mixture(name)
    stack = adopt(model, lora())
    found = sites(model)
    assert len(found) == len(stack.sites["adapter"]) > 1
    for site in found:
        e, o, i = len(site.down), site.up.shape[1], site.down.shape[2]
        assert e == 4
        assert sorted((o, i)) == sorted(site.weight().reshape(e, -1, site.weight().shape[-1]).shape[1:])
        leaf = site.place.path.removesuffix(".weight").rpartition(".")[2]
        assert (i if leaf in ("gate_up_proj", "w1", "v1", "input_linear") else o) == 16
    assert stack.count("adapter") == sum(4 * RANK * (s.place.inputs + s.place.outputs) for s in found)


def test_words_and_patterns_name_experts():
    model = mixture("deepseek_v3")

    def named(*on, layers=None):
        return [place.path for place in Layout(model).places(point(form="linear", size=1, on=on, layers=layers))]

    experts = "model.layers.1.mlp.experts"
    up, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    assert named("experts") == named("experts_up", "experts_down") == named("*.experts.*") == [up, down]
    assert named("*.gate_up_proj") == named(up) == [up]
    assert down not in named("*.down_proj")  # linear layers have that name, too
    assert not set(named("linears")) & {up, down}
    assert named("experts", layers="1:") == [up, down]
    with pytest.raises(RequestError, match="expected experts that lie in one parameter, found none; linear layers"):
        named("experts", layers="0:1")
    with pytest.raises(RequestError, match="expected experts_up that lie in one parameter, found none"):
        Layout(family("llama")).places(point(form="linear", size=1, on=["experts_up"]))


def test_where_sizes_do_not_tell_it_is_said():
    cls, config, settings = MIXTURES["llama4"]
    told = cls(config(**settings | {"intermediate_size": 16}))
    assert all(place.turned for place in Layout(told).places(point(form="linear", size=1, on=["experts"])))
    untold = copy.deepcopy(told)
    for module in untold.modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
            del module.gate_up_proj
    with pytest.raises(RequestError, match=r"down_proj: expected sizes that tell .*found matrices of 16 x 16"):
        Layout(untold).places(point(form="linear", size=1, on=["experts"]))


def test_what_cannot_stand_at_experts_is_refused_with_what_can():
    for more, words in (
        ({"form": "bottleneck"}, "found form bottleneck"),
        ({"insertion": "after"}, "found insertion after"),
        ({"composition": "gated"}, "found composition gated"),
        ({"start": "pissa", "directions": True}, "found PiSSA, DoRA"),
    ):
        with pytest.raises(SettingsError, match=f"fused experts take plain LoRA.*{words}"):
            point(**{"form": "linear", "size": 2, "on": ["linears", "experts"]} | more)
        with pytest.raises(RequestError, match=f"gate_up_proj: fused experts take plain LoRA.*{words}"):
            adopt(mixture("mixtral"), [point(**{"form": "linear", "size": 2, "on": ["*.gate_up_proj"]} | more)])
    with pytest.raises(SettingsError, match="fused experts take plain LoRA, found dora: leave it out"):
        lora(dora=True)
    with pytest.raises(SettingsError, match="found 'before experts': leave out `before`"):
        point(form="linear", size=2, on=["before experts"])
    with pytest.raises(RequestError, match="expected a rank of at most 12, the layer's size"):
        adopt(mixture("gpt_oss"), lora(rank=13))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx"])
def test_learned_scales_several_adapters_and_weights_add_up(name):
    model = mixture(name)
    stack = adopt(model, [point(form="linear", size=2, on=["experts"], composition="scaled", scale="learned")], "one")
    moved(model)
    adopt(model, lora(["experts_down"], rank=4), "two")
    moved(model)
    stack.use({"one": 0.5, "two": -2.0})
    twin, held = mixture(name), {}
    for given, factor in (("one", 0.5), ("two", -2.0)):
        for site in sites(model, given):
            path = site.place.path
            start = held.get(path, twin.get_parameter(path).detach())
            held[path] = start + factor * change(site, site.down, site.up).detach()
    expected = functional_call(twin, held, kwargs=inputs(twin)).logits
    assert torch.allclose(logits(model), expected, atol=2e-5)
    stack.use("one")
    stack.train_only(model, "one")
    loss(model(**inputs(model))).backward()
    assert all(site.scale.grad.abs() > 0 for site in sites(model, "one"))
    stack.use(None)
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("name", list(MIXTURES))
def test_it_folds_in_place_and_into_a_folder(tmp_path, name):
    model = mixture(name)
    adopt(model, lora(["attention_linears", "experts"]), base=tmp_path)
    moved(model)
    expected = logits(model)
    save_folded(model, tmp_path / "whole")
    assert torch.allclose(logits(models.load(tmp_path / "whole")), expected, atol=2e-5)
    assert torch.equal(logits(model), expected)
    assert torch.allclose(logits(fold(model)), expected, atol=2e-5)
    assert adapters_of(model) is None


def test_saved_adapters_load_with_the_same_bits(tmp_path):
    mixture("gpt_oss").save_pretrained(tmp_path / "base")
    model = models.load(tmp_path / "base")
    adopt(model, lora(["linears", "experts"]), base=tmp_path / "base")
    moved(model)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(models.load(tmp_path / "own")), logits(model))


def test_what_runs_by_other_kernels_is_given_the_sum(monkeypatch):
    """Kernels that read a weight from memory would not see the change."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    seen = []

    def kernel(module, *args):
        seen.append(type(module.down_proj))
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "kernel", kernel)
    model = mixture("mixtral", "batched_mm")
    adopt(model, lora(dropout=0.5))
    moved(model)
    expected = logits(model)
    model.config._experts_implementation = "kernel"
    assert torch.allclose(logits(model), expected, atol=2e-5)
    assert seen == 2 * [torch.Tensor]
    model.train()
    with pytest.raises(RequestError, match="computes its experts by kernel, where inputs cannot be dropped"):
        model(**inputs(model))


def weight(*shape, rank=2, **more):
    """A weight of experts with a change, and their sum."""
    plain = torch.randn(shape)
    part = expert_weight.Part(torch.randn(*shape[:-1], rank), torch.randn(*shape[:-2], rank, shape[-1]), 0.5, **more)
    return expert_weight.with_change(plain, [part]), plain + 0.5 * part.left @ part.right


USES = [
    ((5, 3), lambda w, x: w[1] @ x),
    ((5,), lambda w, x: w[1] @ x),
    ((5,), lambda w, x: torch.nn.functional.linear(x, w[0])),
    ((2, 3, 5), lambda w, x: torch.nn.functional.linear(x, w[0], torch.ones(6))),
    ((2, 5), lambda w, x: torch.einsum("eab,nb->ena", w, x)),
    ((2, 6), lambda w, x: x @ w[2].t().T),
    ((2, 5), lambda w, x: x @ w[2].t()[:, :2]),
    ((2, 5), lambda w, x: torch.stack([x @ one.T for one in w])),
    ((2, 5), lambda w, x: torch.matmul(x, w.swapaxes(1, 2))),
    ((4, 2, 5), lambda w, x: x @ w.transpose(-2, -1)),
    ((2, 5, 3), lambda w, x: torch.bmm(w.index_select(0, torch.tensor([3, 0])), x)),
    ((2, 5), lambda w, x: torch.addmm(torch.ones(2, 6), x, w[3].mT)),
    ((5, 2), lambda w, x: w[0][2:4] @ x),
    ((4, 3, 6), lambda w, x: torch.baddbmm(torch.ones(4, 3, 5), x, w)),
    ((5,), lambda w, x: torch.cat([w[0], w[1]], dim=0) @ x),
    ((2,), lambda w, x: w[torch.tensor([True, False, True, False])].mT.sum(1)),
    ((2,), lambda w, x: w[1:3].permute(2, 0, 1).contiguous().exp()),
    ((2,), lambda w, x: w.clone().add_(1).to(torch.float64)),
    ((2,), lambda w, x: w.data.sum()),
    ((2,), lambda w, x: w.reshape(24, 5)),
]
"""Shapes of x, and things that a model may do with it and a weight `[4, 6, 5]`."""


@pytest.mark.parametrize(("shape", "use"), USES)
def test_whatever_is_done_with_the_weight_is_done_with_the_sum(shape, use):
    torch.manual_seed(0)
    known, whole = weight(4, 6, 5)
    x = torch.randn(shape)
    expected, found = use(whole, x), use(known, x)
    assert type(found) is torch.Tensor
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, atol=1e-5)


def test_several_changes_are_rounded_once():
    one = torch.ones(1, 1)
    part = expert_weight.Part(one, one, 2.0**-8)
    assert float(expert_weight.summed(one.bfloat16(), [part, part])) == 1 + 2.0**-7


def test_what_is_asked_of_shape_type_and_place_is_the_weights():
    known, _ = weight(4, 6, 5)
    plain = known.as_subclass(torch.Tensor)
    assert isinstance(known, ExpertWeight)
    assert (known.shape, known.dtype, known.device) == (plain.shape, plain.dtype, plain.device)
    assert (known.ndim, len(known), known.data_ptr()) == (3, 4, plain.data_ptr())
    assert isinstance(known[1], ExpertWeight)
    assert isinstance(known[torch.tensor([0, 2])].mT, ExpertWeight)
    assert known[1].T.shape == (5, 6)
