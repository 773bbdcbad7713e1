"""Each method against its twin, and what must hold for all of them. Pieces are so small that every tensor has many."""

from pathlib import Path

import numpy as np
import pytest
import torch
import twins
from streaming import relatives, streamed

import graft.merge.stream
from graft.errors import CannotCombine, CheckpointError, SettingsError
from graft.merge import VERB
from graft.methods import method_names

W = [0.5, 0.3, 0.4]
THREE = dict(zip("abc", W, strict=True))
LIST = ["a", "b", "c"]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
"""float32 arithmetic in the engine against float64 in the twins: a few roundings of values around 1."""


pytestmark = pytest.mark.usefixtures("many_pieces")


def merged(settings, parents, tmp_path, **options):
    made = streamed(settings, parents, tmp_path, **options)
    return {name: t.double().numpy() for name, t in made.items()}


def arrays(parents, name):
    found = {model: tensors[name].double().numpy() for model, tensors in parents.items()}
    return found.get("base"), [found[m] for m in found if m != "base"]


def ties(base, models, density=0.3, scale=1.0, normalise=True):
    return base + scale * twins.elect([twins.trim(d, density) for d in twins.deltas(base, models)], W, normalise)


def crumbs(combine):
    def twin(base, models):
        return base + combine([twins.crumbs(d, 0.6, 0.1) for d in twins.deltas(base, models)], W, False)

    return twin


def rows(function):
    return lambda *vectors: np.stack([function(*(v[i] for v in vectors)) for i in range(len(vectors[0]))])


def by_rows(function, *vectors):
    two = [np.atleast_2d(v) for v in vectors]
    return rows(function)(*two).reshape(vectors[0].shape)


CASES = {
    "linear": ({"models": THREE}, lambda b, m: twins.linear(m, W)),
    "uniform_soup": ({"models": LIST}, lambda b, m: sum(m) / 3),
    "linear-plain": (
        {"method": "linear", "models": THREE, "normalise": False},
        lambda b, m: twins.linear(m, W) * sum(W),
    ),
    "task_arithmetic": (
        {"base": "base", "models": {"a": 0.5, "b": -0.3, "c": 0.4}, "scale": 0.7},
        lambda b, m: b + 0.7 * twins.add(twins.deltas(b, m), [0.5, -0.3, 0.4], False),
    ),
    "ties": ({"base": "base", "models": THREE, "density": 0.3}, ties),
    "ties-sum": (
        {"method": "ties", "base": "base", "models": THREE, "density": 0.3, "normalise": False, "scale": 1.3},
        lambda b, m: ties(b, m, scale=1.3, normalise=False),
    ),
    "breadcrumbs": ({"base": "base", "models": THREE, "density": 0.6, "gamma": 0.1}, crumbs(twins.add)),
    "breadcrumbs_ties": ({"base": "base", "models": THREE, "density": 0.6, "gamma": 0.1}, crumbs(twins.elect)),
    "slerp": ({"models": ["a", "b"], "t": 0.3}, lambda b, m: twins.slerp(m[0], m[1], 0.3)),
    "nuslerp": ({"models": {"a": 0.5, "b": 0.3}}, lambda b, m: twins.slerp(m[0], m[1], 0.375)),
    "nuslerp-deltas": (
        {"method": "nuslerp", "base": "base", "models": {"a": 0.5, "b": 0.3}},
        lambda b, m: b + twins.slerp(m[0] - b, m[1] - b, 0.375),
    ),
    "nuslerp-rows": (
        {"method": "nuslerp", "base": "base", "models": {"a": 0.5, "b": 0.3}, "by": "row"},
        lambda b, m: b + by_rows(lambda x, y: twins.slerp(x, y, 0.375), m[0] - b, m[1] - b),
    ),
    "multislerp": ({"models": THREE}, lambda b, m: twins.multislerp(m, W)),
    "multislerp-deltas": (
        {"method": "multislerp", "base": "base", "models": THREE},
        lambda b, m: b + twins.multislerp(twins.deltas(b, m), W),
    ),
    "karcher": ({"models": THREE, "iterations": 100, "tolerance": 1e-9}, lambda b, m: twins.karcher(m, W)),
    "model_stock": ({"base": "base", "models": LIST}, twins.model_stock),
    "model_stock-rows": (
        {"method": "model_stock", "base": "base", "models": LIST, "by": "row"},
        lambda b, m: by_rows(lambda base, *models: twins.model_stock(base, models), b, *m),
    ),
    "nearswap": ({"base": "base", "models": ["a"], "t": 0.05}, lambda b, m: twins.nearswap(b, m[0], 0.05)),
    "arcee_fusion": ({"base": "base", "models": ["a"]}, lambda b, m: twins.arcee_fusion(b, m[0])),
    "sce": ({"base": "base", "models": LIST, "select": 0.4}, lambda b, m: twins.sce(b, m, 0.4)),
    "sce-all": ({"method": "sce", "base": "base", "models": LIST}, lambda b, m: twins.sce(b, m, 1)),
    "ram": ({"base": "base", "models": LIST, "epsilon": 0.08}, lambda b, m: twins.ram(b, m, 0.08)),
    "ramplus_tl": (
        {"base": "base", "models": LIST, "epsilon": 0.08, "r": 0.5, "alpha": 0.4},
        lambda b, m: twins.ram(b, m, 0.08, 0.5, 0.4),
    ),
    "passthrough": ({"models": ["a"], "scale": 0.9}, lambda b, m: 0.9 * m[0]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_method_is_its_formula(case, tmp_path):
    settings, twin = CASES[case]
    parents = relatives(step=1.5 if "slerp" in case or case == "karcher" else 0.1)
    made = merged({"method": case} | settings, parents, tmp_path)
    for name in ("w", "v"):
        base, models = arrays(parents, name)
        np.testing.assert_allclose(made[name], twin(base, models), **TOLERANCE, err_msg=name)


SPARSE = ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
WHOLE = {"density": 1.0}
ONE_EACH = {name: {"base": "base", "models": ["a", "b"]} | (WHOLE if name in SPARSE else {}) for name in SPARSE} | {
    "linear": {"models": ["a", "b"]},
    "uniform_soup": {"models": ["a", "b"]},
    "task_arithmetic": {"base": "base", "models": ["a", "b"]},
    "slerp": {"models": ["a", "b"]},
    "nuslerp": {"models": ["a", "b"]},
    "multislerp": {"models": ["a", "b"]},
    "karcher": {"models": ["a", "b"]},
    "model_stock": {"base": "base", "models": ["a", "b"]},
    "sce": {"base": "base", "models": ["a", "b"]},
    "ram": {"base": "base", "models": ["a", "b"], "epsilon": 0},
    "ramplus_tl": {"base": "base", "models": ["a", "b"], "epsilon": 0},
    "nearswap": {"base": "base", "models": ["a"], "t": 10.0},
    "arcee_fusion": {"base": "base", "models": ["a"]},
    "passthrough": {"models": ["a"]},
}

READING = {"fisher", "regmean", "regmean_plus", "adamerging", "localize_and_stitch"}
ELSEWHERE = {
    "tsv_merge",
    "iso_c",
    "iso_cts",
    "wudi",
    "knots",
    *READING,
    "greedy_soup",
    "learned_soup",
    "checkpoints",
    "rebasin",
}
"""Methods that do not give back equal models, or read data: held to their own properties in their own files."""


def averaging(name):
    """Settings under which two models count half each."""
    return {"normalise": True} if name in (*SPARSE, "task_arithmetic") else {}


def test_every_method_is_held_to_the_properties():
    adapters = {name for name, settings in VERB.types().items() if settings.makes == "adapter"}
    assert adapters == {"add_adapters", "extract_lora"}
    assert set(ONE_EACH) | ELSEWHERE | adapters == set(method_names("graft.merge"))


@pytest.mark.parametrize("name", [n for n in sorted(ONE_EACH) if n != "arcee_fusion"])
def test_a_model_merged_with_itself_is_that_model(name, tmp_path):
    parents = relatives(1)
    parents["b"] = parents["a"]
    made = merged({"method": name} | ONE_EACH[name] | averaging(name), parents, tmp_path)
    for tensor in ("w", "v"):
        np.testing.assert_allclose(made[tensor], parents["a"][tensor].double().numpy(), rtol=2e-6, atol=2e-7)


def test_fusing_a_model_with_itself_changes_nothing(tmp_path):
    parents = relatives(1)
    parents["a"] = parents["base"]
    made = streamed({"method": "arcee_fusion", "base": "base", "models": ["a"]}, parents, tmp_path)
    assert all(torch.equal(made[name], parents["base"][name]) for name in made)


SYMMETRIC = [n for n in sorted(ONE_EACH) if n not in ("slerp", "nuslerp", "nearswap", "arcee_fusion", "passthrough")]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_equal_models_changes_nothing(name, tmp_path):
    parents = relatives(3)
    settings = {"method": name} | ONE_EACH[name] | ({"density": 0.5} if name in SPARSE else {})
    one = merged(settings | {"models": ["a", "b", "c"]}, parents, tmp_path / "1", seed=3)
    other = merged(settings | {"models": ["c", "a", "b"]}, parents, tmp_path / "2", seed=3)
    assert one.keys() == other.keys() == {"w", "v"}
    for tensor in one:
        np.testing.assert_allclose(one[tensor], other[tensor], rtol=1e-5, atol=2e-6)


OF_TWO = ("slerp", "nuslerp", "model_stock")
"""Methods that take no model alone; the ends of the first two are in test_merge_random.py."""
UNWEIGHTED = ("uniform_soup", "sce", "ram", "ramplus_tl", "nearswap", "passthrough")


@pytest.mark.parametrize("name", [n for n in sorted(ONE_EACH) if n not in (*OF_TWO, "arcee_fusion")])
def test_one_model_with_weight_one_is_that_model(name, tmp_path):
    parents = relatives(1)
    alone = ["a"] if name in UNWEIGHTED else {"a": 1.0}
    made = merged({"method": name} | ONE_EACH[name] | {"models": alone}, parents, tmp_path)
    for tensor in ("w", "v"):
        np.testing.assert_allclose(made[tensor], parents["a"][tensor].double().numpy(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs"])
def test_with_nothing_dropped_it_is_task_arithmetic(name, tmp_path):
    parents = relatives(3)
    plain = streamed({"method": "task_arithmetic", "base": "base", "models": THREE}, parents, tmp_path)
    made = streamed({"method": name, "base": "base", "models": THREE, "density": 1.0}, parents, tmp_path)
    for tensor in plain:
        torch.testing.assert_close(made[tensor], plain[tensor], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", ["dare_ties", "della", "breadcrumbs_ties"])
def test_with_nothing_dropped_it_is_ties_with_nothing_trimmed(name, tmp_path):
    parents = relatives(3)
    settings = {"base": "base", "models": THREE, "density": 1.0, "normalise": True}
    plain = streamed({"method": "ties"} | settings, parents, tmp_path)
    made = streamed({"method": name} | settings, parents, tmp_path)
    assert all(torch.equal(made[tensor], plain[tensor]) for tensor in plain)


def test_weights_of_a_mean_are_made_to_sum_to_one(tmp_path):
    parents = relatives(2)
    one = streamed({"method": "linear", "models": {"a": 1, "b": 3}}, parents, tmp_path)
    other = streamed({"method": "linear", "models": {"a": 0.25, "b": 0.75}, "normalise": False}, parents, tmp_path)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_analogy_is_task_arithmetic_from_the_third_model(tmp_path):
    parents = relatives(3)
    made = streamed({"method": "task_arithmetic", "base": "c", "models": {"b": 1, "a": -1}}, parents, tmp_path)
    expected = parents["c"]["w"] + (parents["b"]["w"] - parents["a"]["w"])
    torch.testing.assert_close(made["w"], expected, rtol=2e-6, atol=5e-7)


def test_a_negative_weight_takes_a_task_away(tmp_path):
    parents = relatives(1)
    made = streamed({"method": "task_arithmetic", "base": "base", "models": {"a": -1}}, parents, tmp_path)
    torch.testing.assert_close(made["w"], 2 * parents["base"]["w"] - parents["a"]["w"], rtol=2e-6, atol=5e-7)


RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_gives_the_same_bytes_however_the_work_is_cut(name, tmp_path, monkeypatch):
    parents = relatives(3)
    settings = {"method": name, "base": "base", "models": THREE, "density": 0.4}
    one = streamed(settings, parents, tmp_path, seed=5)
    other = streamed(settings, parents, tmp_path, seed=6)
    monkeypatch.setattr(graft.merge.stream, "PIECE", 24)
    again = streamed(settings, parents, tmp_path, seed=5, threads=3)
    assert torch.equal(one["w"], again["w"])
    assert not torch.equal(one["w"], other["w"])


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_what_is_dropped_is_made_up_for_on_average(name, tmp_path, monkeypatch):
    monkeypatch.setattr(graft.merge.stream, "PIECE", 1 << 12)
    parents = relatives(1, shape=(200, 300))
    made = streamed({"method": name, "base": "base", "models": ["a"], "density": 0.5}, parents, tmp_path)
    kept = (made["w"] - parents["base"]["w"]).double()
    delta = (parents["a"]["w"] - parents["base"]["w"]).double()
    # over 60,000 elements the share of δ² that comes back has a standard deviation of about 0.01
    assert abs(float((kept * delta).sum() / (delta * delta).sum()) - 1) < 0.04


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_the_l1_norm_is_kept_where_that_is_asked_for(name, tmp_path):
    parents = relatives(1, shape=(20, 30))
    settings = {"method": name, "base": "base", "models": ["a"], "density": 0.3, "rescale": "l1"}
    made = streamed(settings, parents, tmp_path)
    delta = (made["w"] - parents["base"]["w"]).double()
    full = (parents["a"]["w"] - parents["base"]["w"]).double()
    assert float(delta.abs().sum()) == pytest.approx(float(full.abs().sum()), rel=1e-5)
    assert (delta == 0).double().mean().item() == pytest.approx(0.7, abs=0.08)


def test_della_keeps_large_changes_more_often(tmp_path, monkeypatch):
    monkeypatch.setattr(graft.merge.stream, "PIECE", 1 << 12)
    parents = {"base": {"w": torch.zeros(200, 11)}, "a": {"w": torch.arange(1.0, 12).repeat(200, 1)}}
    settings = {"method": "della_linear", "base": "base", "models": ["a"], "density": 0.5, "epsilon": 0.4}
    kept = (streamed(settings | {"rescale": "none"}, parents, tmp_path)["w"] != 0).double().mean(dim=0)
    expected = torch.linspace(0.1, 0.9, 11, dtype=torch.float64)
    # 200 draws a column: a standard deviation of 0.035 at most
    assert float((kept - expected).abs().max()) < 0.12


def test_ties_trims_the_whole_model_where_that_is_asked_for(tmp_path):
    parents = relatives(1)
    parents["a"]["v"] = parents["base"]["v"] + 0.001
    made = streamed(
        {"method": "ties", "base": "base", "models": ["a"], "density": 0.5, "trim": "model"}, parents, tmp_path
    )
    both = np.concatenate([(parents["a"][n] - parents["base"][n]).numpy().ravel() for n in ("v", "w")])
    expected = twins.keep_largest(both, int(0.5 * both.size))
    found = np.concatenate([(made[n] - parents["base"][n]).numpy().ravel() for n in ("v", "w")])
    np.testing.assert_allclose(found, expected, atol=5e-7)
    assert not found[:9].any()


def test_a_density_for_each_model(tmp_path):
    parents = relatives(2)
    settings = {"method": "ties", "base": "base", "models": ["a", "b"], "normalise": False}
    made = streamed(settings | {"density": {"a": 1.0, "b": 0.1}}, parents, tmp_path)
    base, (a, b) = arrays(parents, "w")
    expected = base + twins.elect([a - base, twins.trim(b - base, 0.1)], [1, 1], False)
    np.testing.assert_allclose(made["w"].double().numpy(), expected, **TOLERANCE)


def test_sce_weighs_small_task_vectors_by_its_formula_too(tmp_path):
    """mergekit weighs all alike where the mean square is below 1e-6, which real task vectors are."""
    parents = relatives(2, step=1e-4)
    parents["b"]["w"] = parents["base"]["w"] + 5 * (parents["b"]["w"] - parents["base"]["w"])
    made = merged({"method": "sce", "base": "base", "models": ["a", "b"]}, parents, tmp_path)
    base, models = arrays(parents, "w")
    np.testing.assert_allclose(made["w"] - base, twins.sce(base, models, 1) - base, rtol=2e-3, atol=3e-7)


def test_the_page_on_merging_tells_of_every_method():
    page = (Path(__file__).parents[2] / "docs" / "merging.md").read_text()
    assert [name for name in method_names("graft.merge") if f"`{name}`" not in page] == []


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", sorted(ONE_EACH))
def test_every_method_writes_the_dtype_it_was_told(name, dtype, tmp_path):
    parents = relatives(2)
    exact = streamed({"method": name} | ONE_EACH[name], parents, tmp_path)
    made = streamed({"method": name} | ONE_EACH[name], parents, tmp_path, dtype=dtype)
    wanted = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    assert all(made[tensor].dtype == wanted and torch.equal(made[tensor], exact[tensor].to(wanted)) for tensor in made)


def test_a_zero_tensor_and_a_zero_delta_do_no_harm(tmp_path):
    parents = relatives(2)
    for model in parents.values():
        model["v"] = torch.zeros(9)
    for name, settings in ONE_EACH.items():
        made = streamed({"method": name} | settings, parents, tmp_path)
        assert torch.equal(made["v"], torch.zeros(9)), name


def test_directions_that_cancel_are_refused(tmp_path):
    third = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], dtype=torch.float64)
    parents = {m: {"w": third[i : i + 1].float()} for i, m in enumerate("abc")}
    parents["c"]["w"] = -(parents["a"]["w"] + parents["b"]["w"])
    with pytest.raises(CannotCombine, match="directions of a, b, c cancel"):
        streamed({"method": "multislerp", "models": LIST}, parents, tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named(bad, tmp_path):
    parents = relatives(2)
    parents["b"]["w"][3, 4] = bad
    with pytest.raises(CheckpointError, match="b: NaN or Inf in w"):
        streamed({"method": "linear", "models": ["a", "b"]}, parents, tmp_path)


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    parents = {m: {"w": torch.full((3, 3), 6e4)} for m in ("a", "b")}
    with pytest.raises(CheckpointError, match="w: the merge gives values that F16 cannot hold"):
        streamed({"method": "linear", "models": ["a", "b"], "normalise": False}, parents, tmp_path, dtype="F16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ties", "base": "x", "models": ["a"], "denisty": 0.2}, "did you mean 'density'"),
        (
            {"models": ["a"], "base": "x"},
            r"base: linear takes no `base`; .*breadcrumbs, .* more do: name one as `method`",
        ),
        ({"method": "ties", "base": "x", "models": ["a"], "t": 1}, "t: ties takes no `t`; nearswap, slerp do"),
        ({"method": "ties", "models": ["a"]}, "base: this key is required and missing"),
        ({"method": "ties", "base": "a", "models": ["a", "b"]}, "expected a base that is not among the models"),
        ({"method": "ties", "base": "x", "models": ["a"], "density": 1.5}, "expected a density above 0"),
        ({"method": "ties", "base": "x", "models": ["a"], "density": {"b": 0.5}}, "expected a value for each of a"),
        ({"method": "della", "base": "x", "models": ["a"], "density": 0.9}, "expected density ± epsilon inside"),
        ({"method": "slerp", "models": ["a", "b", "c"]}, "at most 2"),
        ({"method": "nuslerp", "models": ["a"]}, "expected two models, found 1"),
        ({"method": "linear", "models": {"a": 1, "b": -1}}, "expected weights whose sum is not 0"),
        ({"method": "karcher", "models": {"a": 1, "b": -1}}, "expected weights above 0"),
        ({"method": "linear", "models": ["a", "a"]}, "expected each model once"),
        ({"method": "passthrough", "models": ["a"], "slices": [{"a": [0, 1]}]}, "found both"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        VERB.parse(settings)
