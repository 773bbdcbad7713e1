"""Every named point: identity at the start, its formula, its number of parameters, its gradients."""

import copy

import pytest
import torch
from torch.nn import functional

from graft.adapters import Point, adapters_of, adopt
from graft.adapters.forms import FORMS
from graft.adapters.places import Layout
from graft.errors import RequestError, SettingsError
from graft.methods import method
from graft.settings import parse
from graft.tune import named_points

from .families import family, inputs, logits, moved

NAMED = named_points()
EVERYWHERE = ["llama", "gpt2", "bert", "t5", "bart"]
SMALL = {
    "lora": {"rank": 4},
    "houlsby": {"width": 4, "nonlinearity": "gelu"},
    "mix_and_match": {"width": 4, "length": 3},
}


def points(name, **options):
    module = method("graft.tune", name)
    return module.points(parse(module.Settings, SMALL.get(name, {}) | options))


def point(**settings):
    return parse(Point, settings)


def fits(name, model):
    return not (name == "bitfit" and model in ("llama", "t5"))


@pytest.mark.parametrize("model_name", EVERYWHERE)
@pytest.mark.parametrize("name", list(NAMED))
def test_every_method_starts_as_the_identity_and_then_learns(name, model_name):
    if not fits(name, model_name):
        pytest.skip("this model has no biases")
    model = family(model_name)
    before = logits(model)
    stack = adopt(model, points(name))
    assert torch.equal(logits(model), before)
    moved(model, 1.0)
    assert not torch.allclose(logits(model), before, rtol=0, atol=1e-6)
    stack.use(None)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("options", [{"dora": True}, {"pissa": True}, {"rslora": True}, {"dora": True, "pissa": True}])
def test_the_options_of_lora_start_as_the_identity_too(options):
    for name in ("llama", "gpt2"):
        model = family(name)
        before = logits(model)
        adopt(model, points("lora", **options))
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("composition", ["add", "scaled", "gated"])
@pytest.mark.parametrize("insertion", ["parallel", "after"])
@pytest.mark.parametrize("form", ["linear", "bottleneck"])
def test_every_corner_of_the_space_starts_as_the_identity(form, insertion, composition):
    model = family("llama")
    before = logits(model)
    adopt(model, [point(form=form, insertion=insertion, composition=composition, on=["attention", "down"], size=2)])
    assert torch.equal(logits(model), before)
    moved(model)
    assert not torch.allclose(logits(model), before, atol=1e-4)


def test_gradients_reach_only_what_is_trained():
    for name in NAMED:
        model = family("gpt2")
        adopt(model, points(name))
        moved(model)
        model(**inputs(model)).logits.square().mean().backward()
        for path, parameter in model.named_parameters():
            trained = path.startswith("graft_adapters.")
            assert parameter.requires_grad == trained
            assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, (name, path)


WIDTH, INNER, HEADS, LAYERS = 16, 24, 4, 2
KEYS = 8  # two heads of keys, of four channels
LINEARS = [(16, 16), (16, KEYS), (16, KEYS), (16, 16), (16, INNER), (16, INNER), (INNER, 16)]
COUNTS = {
    "lora": LAYERS * sum(4 * (i + o) for i, o in LINEARS),
    "houlsby": LAYERS * 2 * (2 * 4 * WIDTH + 4 + WIDTH),
    "pfeiffer": LAYERS * (2 * 64 * WIDTH + 64 + WIDTH),
    "parallel_adapter": LAYERS * (2 * 64 * WIDTH + 64 + WIDTH),
    "scaled_parallel_adapter": LAYERS * (2 * 64 * WIDTH + 64 + WIDTH),
    "prefix": LAYERS * (2 * 16 * KEYS + HEADS),
    "prompt": 16 * WIDTH + LAYERS * HEADS,
    "ia3": LAYERS * (2 * KEYS + INNER),
    "mix_and_match": LAYERS * (2 * 3 * KEYS + HEADS + 2 * 4 * WIDTH + 4 + WIDTH),
}


@pytest.mark.parametrize("name", list(COUNTS))
def test_the_number_of_parameters_is_that_of_the_formula(name):
    model = family("llama")
    assert adopt(model, points(name)).count("adapter") == COUNTS[name]


def test_bitfit_has_a_number_for_each_bias():
    model = family("gpt2")
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias"))
    assert adopt(model, points("bitfit")).count("adapter") == biases


def test_the_formula_of_each_form_is_what_a_site_has():
    model = family("gpt2")
    for settings in (
        {"form": "linear", "size": 3, "on": ["linears"], "directions": True},
        {"form": "bottleneck", "size": 5, "on": ["feed_forward"], "biases": True, "composition": "gated"},
        {"form": "scale", "on": ["qkv"], "insertion": "after", "composition": "scaled", "scale": "learned"},
    ):
        one = point(**settings)
        expected = sum(FORMS[one.form].count(one, p.inputs, p.outputs) for p in Layout(model).places(one))
        tried = copy.deepcopy(model)
        assert adopt(tried, [one]).count("adapter") == expected


# -- the unified view -------------------------------------------------------------------------------------------------


def test_a_parallel_linear_point_at_the_query_is_lora():
    free = point(form="linear", insertion="parallel", on=["query"], composition="scaled", scale=4.0, size=4)
    assert points("lora", on=["query"], alpha=16) == [free]
    model = family("llama")
    adopt(model, [free])
    moved(model)
    plain = family("llama")
    sites = adapters_of(model).sites["adapter"]
    for layer, site in zip(plain.model.layers, sites.values(), strict=True):
        layer.self_attn.q_proj.weight.data += 4.0 * (site.up @ site.down).detach()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


def test_each_form_is_its_formula():
    x = torch.randn(3, 5, 16)
    for settings, formula in (
        ({"form": "linear", "size": 2}, lambda s, h: h + (x @ s.down.T) @ s.up.T),
        ({"form": "linear", "size": 2, "insertion": "after"}, lambda s, h: h + (h @ s.down.T) @ s.up.T),
        (
            {"form": "bottleneck", "size": 2, "nonlinearity": "gelu", "composition": "scaled", "scale": 4.0},
            lambda s, h: h + 4.0 * functional.gelu(x @ s.down.T) @ s.up.T,
        ),
        (
            {"form": "bottleneck", "size": 2, "biases": True, "composition": "gated"},
            lambda s, h: (1 - s.gate) * h + s.gate * ((x @ s.down.T + s.down_bias).relu() @ s.up.T + s.up_bias),
        ),
        ({"form": "scale", "insertion": "after"}, lambda s, h: h * (1 + s.factor)),
    ):
        model = family("llama")
        stack = adopt(model, [point(on=["query"], **settings)])
        moved(model, 0.5)
        site = next(iter(stack.sites["adapter"].values()))
        query = model.model.layers[0].self_attn.q_proj
        assert torch.allclose(query(x), formula(site, functional.linear(x, query.weight)), atol=1e-5)


def test_dora_trains_lengths_and_directions():
    model = family("gpt2")
    stack = adopt(model, points("lora", on=["qkv"], dora=True, alpha=8))
    moved(model)
    site = next(iter(stack.sites["adapter"].values()))
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(3, 5, 16)
    turned = layer.weight.T + 2.0 * site.up @ site.down
    weight = site.magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x), x @ weight.T + layer.bias, atol=1e-5)


def test_pissa_starts_from_the_largest_singular_values():
    model = family("llama")
    stack = adopt(model, points("lora", on=["query"], pissa=True, rank=3, alpha=6))
    site = next(iter(stack.sites["adapter"].values()))
    u, values, v = torch.linalg.svd(model.model.layers[0].self_attn.q_proj.weight)
    best = u[:, :3] @ values[:3].diag() @ v[:3]
    assert torch.allclose(2.0 * site.up @ site.down, best, atol=1e-5)
    assert float(site.product().abs().max()) == 0.0


def test_a_scale_before_the_last_layer_of_the_feed_forward():
    model = family("llama")
    adopt(model, [point(form="scale", insertion="after", on=["intermediate"])])
    moved(model)
    plain = family("llama")
    for layer, site in zip(plain.model.layers, adapters_of(model).sites["adapter"].values(), strict=True):
        layer.mlp.down_proj.weight.data *= 1 + site.factor.detach()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


def test_dropout_is_for_training_only():
    model = family("llama")
    adopt(model, points("lora", dropout=0.5))
    moved(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_weights_in_full_precision_train_over_a_base_in_half():
    for name in ("lora", "houlsby", "prefix", "prompt", "ia3"):
        model = family("llama").to(torch.bfloat16)
        adopt(model, points(name))
        for parameter in adapters_of(model).parameters():
            parameter.data = parameter.data.float()
        found = model(**inputs(model)).logits
        assert torch.equal(found, logits(family("llama").to(torch.bfloat16)))
        found.float().square().mean().backward()
        assert {p.grad.dtype for p in adapters_of(model).parameters() if p.grad is not None} == {torch.float32}


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_rank_above_the_layers_size_is_refused():
    with pytest.raises(RequestError, match=r"k_proj: expected a rank of at most 8.*\(16 → 8\), found 9"):
        adopt(family("llama"), points("lora", rank=9))


def test_points_that_mean_nothing_are_refused():
    for settings, words in (
        ({"form": "linear", "on": ["query"]}, "expected a size"),
        ({"form": "scale", "on": ["query"], "insertion": "after", "size": 3}, "expected no size"),
        ({"form": "bottleneck", "on": ["attention"], "size": 2, "scale": 2.0}, "composition: scaled"),
        ({"form": "bottleneck", "on": ["attention"], "size": 2, "start": "pissa"}, "linear points in parallel"),
        ({"form": "softmax", "on": ["feed_forward"], "size": 2}, "beside those of attention"),
        ({"form": "tokens", "on": ["attention"], "size": 2}, "stand at the input"),
        ({"form": "linear", "on": ["query"], "size": 2, "layers": "1-3"}, "expected layers such as"),
        ({"form": "linear", "on": ["biases"], "size": 2}, "expected the form bias or scale, found linear"),
    ):
        with pytest.raises(SettingsError, match=words):
            point(**settings)


def test_a_name_is_given_once():
    model = family("llama")
    adopt(model, points("lora"), "a")
    with pytest.raises(RequestError, match="expected a new name"):
        adopt(model, points("lora"), "a")
