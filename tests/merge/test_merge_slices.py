"""Stacks of slices: a slice is merged as its layers would be alone."""

import json

import pytest
import torch
from small_family import family, merge, model, save, tensors
from typer.testing import CliRunner

import graft
import graft.merge
from graft.cli import app
from graft.errors import CannotCombine, SettingsError
from graft.facts import facts_of
from graft.models import load


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    made = family(root, 2, num_hidden_layers=4)
    return made | {"small": save(model(0, num_hidden_layers=2), root / "small")}


def layer(number):
    return f"model.layers.{number}.mlp.up_proj.weight"


METHODS = {
    "linear": {"models": {"a": 1, "b": 3}},
    "slerp": {"models": ["a", "b"], "t": 0.3},
    "ties": {"base": "base", "models": ["a", "b"], "density": 0.5},
    "dare_linear": {"base": "base", "models": ["a", "b"]},
    "karcher": {"models": ["a", "b"]},
    "model_stock": {"base": "base", "models": ["a", "b"]},
}


@pytest.mark.parametrize("name", METHODS)
def test_slices_that_are_all_layers_are_the_merge(name, folders, tmp_path):
    plain, _ = merge({"method": name} | METHODS[name], folders, tmp_path / "plain", seed=1)
    slices = [{"a": [0, 3], "b": [0, 3]}, {"a": [3, 4], "b": [3, 4]}]
    cut, _ = merge({"method": name, "slices": slices} | METHODS[name], folders, tmp_path / "cut", seed=1)
    assert plain.keys() == cut.keys()
    assert all(torch.equal(plain[tensor], cut[tensor]) for tensor in plain)


def test_each_slice_has_its_own_layers_and_models(folders, tmp_path):
    slices = [{"a": [0, 1], "b": [2, 3]}, {"b": [0, 2]}]
    out, _ = merge({"method": "linear", "models": {"a": 1, "b": 3}, "slices": slices}, folders, tmp_path / "out")
    a, b = tensors(folders["a"]), tensors(folders["b"])
    torch.testing.assert_close(out[layer(0)], 0.25 * a[layer(0)] + 0.75 * b[layer(2)])
    assert torch.equal(out[layer(1)], b[layer(0)])
    assert torch.equal(out[layer(2)], b[layer(1)])
    torch.testing.assert_close(
        out["model.embed_tokens.weight"],
        0.25 * a["model.embed_tokens.weight"] + 0.75 * b["model.embed_tokens.weight"],
    )
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"])
    assert load(tmp_path / "out").config.num_hidden_layers == 3


def test_task_vectors_are_taken_from_the_bases_layers(folders, tmp_path):
    slices = [{"base": [1, 3], "a": [2, 4]}, {"base": [3, 4]}]
    settings = {"method": "task_arithmetic", "base": "base", "models": ["a"], "scale": 0.5, "slices": slices}
    out, _ = merge(settings, folders, tmp_path / "out")
    base, a = tensors(folders["base"]), tensors(folders["a"])
    torch.testing.assert_close(out[layer(0)], 0.5 * (base[layer(1)] + a[layer(2)]))
    assert torch.equal(out[layer(2)], base[layer(3)])
    assert torch.equal(out["lm_head.weight"], base["lm_head.weight"])


def test_models_of_different_depth_are_stacked(folders, tmp_path):
    slices = [{"small": [0, 2]}, {"a": [2, 4]}]
    out, _ = merge({"method": "passthrough", "slices": slices, "anyway": True}, folders, tmp_path / "out")
    assert torch.equal(out[layer(1)], tensors(folders["small"])[layer(1)])
    assert torch.equal(out[layer(3)], tensors(folders["a"])[layer(3)])
    assert load(tmp_path / "out").config.num_hidden_layers == 4


def test_a_gradient_follows_the_layers_of_the_output(folders, tmp_path):
    slices = [{"a": [0, 2], "b": [0, 2]}, {"a": [0, 1], "b": [0, 1]}]
    settings = {"method": "linear", "models": {"a": [0, 1], "b": [1, 0]}, "slices": slices}
    out, _ = merge(settings, folders, tmp_path / "out")
    a, b = tensors(folders["a"]), tensors(folders["b"])
    assert torch.equal(out[layer(0)], b[layer(0)])
    assert torch.equal(out[layer(2)], a[layer(0)])


def test_the_facts_of_a_stack_are_known_before_it_is_made(folders):
    slices = [{"a": [0, 4]}, {"a": [1, 4]}]
    settings = graft.merge.VERB.parse({"method": "passthrough", "slices": slices})
    made = graft.merge.VERB.facts(settings, {"a": facts_of(folders["a"])}, "key")
    assert made.config["num_hidden_layers"] == 7


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([{"a": [0, 1], "b": [0, 2]}], r"expected as many layers of each model, found a: \[0, 1\], b: \[0, 2\]"),
        ([{"a": [0, 1], "c": [0, 1]}], "expected slices of base, a, b, found one of a, c"),
        ([{"a": [2, 1]}], r"expected layers as \[first, after the last\], found \[2, 1\]"),
        ([{"a": [0, 1], "b": [1, 2]}], "expected the layers of base too, where those of the models differ"),
        ([{}], "found one of none"),
    ],
)
def test_slices_that_cannot_be_are_refused(slices, message):
    with pytest.raises(SettingsError, match=message):
        graft.merge.VERB.parse({"method": "ties", "base": "base", "models": ["a", "b"], "slices": slices})


def test_a_slice_that_the_method_cannot_merge_is_refused_before_anything_is_written(folders, tmp_path):
    with pytest.raises(CannotCombine, match=r"lm_head.weight: models: expected at least 2 items"):
        settings = {"method": "slerp", "models": ["a", "b"], "slices": [{"a": [0, 1], "b": [0, 1]}, {"a": [1, 2]}]}
        merge(settings, folders, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_python_a_command_and_a_recipe_stack_alike(folders, tmp_path):
    a, b = str(folders["a"]), str(folders["b"])
    slices = [{a: [0, 2]}, {b: [1, 4]}]
    python = graft.merge(tmp_path / "python", method="passthrough", slices=slices)
    words = ["merge", str(tmp_path / "cli"), "--method", "passthrough", "--slices", json.dumps(slices)]
    assert CliRunner().invoke(app, words).exit_code == 0
    (tmp_path / "r.yaml").write_text(
        f"family: f\nmodels:\n  a: {{load: {a}}}\n  b: {{load: {b}}}\n"
        "  m: {merge: {method: passthrough, slices: [{a: [0, 2]}, {b: [1, 4]}]}}\n"
    )
    recipe = graft.run(tmp_path / "r.yaml", tmp_path / "run").folder / "models" / "m"
    one, *others = (tensors(place) for place in (python, tmp_path / "cli", recipe))
    assert torch.equal(one[layer(4)], tensors(folders["b"])[layer(3)])
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)
