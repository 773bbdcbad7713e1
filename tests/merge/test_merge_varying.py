"""Numbers by layer and by name: each tensor is merged as if its own number had been written for all."""

import json
import pickle
import re

import pytest
import torch
from small_family import family, merge, tensors
from streaming import relatives, streamed
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.errors import CannotCombine, SettingsError
from graft.merge import VERB
from graft.merge.slices import depths
from graft.merge.varying import by_tensor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"), 2, num_hidden_layers=3)


LAYERS = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]


def test_depth_is_the_place_among_the_layers_of_its_kind():
    names = [
        *LAYERS,
        "model.embed_tokens.weight",
        "model.norm.weight",
        "encoder.block.0.layer.1.x",
        "encoder.block.4.y",
    ]
    assert depths(names) == {
        LAYERS[0]: 0, LAYERS[1]: 0.5, LAYERS[2]: 1, "model.embed_tokens.weight": 0, "model.norm.weight": 1,
        "encoder.block.0.layer.1.x": 0, "encoder.block.4.y": 1,
    }  # fmt: skip


VARYING = {
    "weight": ({"method": "linear"}, lambda x: {"models": {"a": x, "b": 1}}),
    "t": ({"method": "slerp", "models": ["a", "b"]}, lambda x: {"t": x}),
    "density": ({"method": "ties", "base": "base", "models": ["a", "b"]}, lambda x: {"density": x}),
    "density of one": (
        {"method": "dare_ties", "base": "base", "models": ["a", "b"]}, lambda x: {"density": {"a": x, "b": 0.5}},
    ),
    "gamma": ({"method": "breadcrumbs", "base": "base", "models": ["a", "b"]}, lambda x: {"gamma": x, "density": 0.1}),
    "epsilon": ({"method": "della", "base": "base", "models": ["a"], "density": 0.5}, lambda x: {"epsilon": x}),
    "scale": ({"method": "task_arithmetic", "base": "base", "models": ["a", "b"]}, lambda x: {"scale": x}),
    "select": ({"method": "sce", "base": "base", "models": ["a", "b"]}, lambda x: {"select": x}),
    "passthrough": ({"method": "passthrough", "models": ["a"]}, lambda x: {"scale": x}),
}  # fmt: skip


NUMBERS = [0.1, 0.3, 0.4]


@pytest.mark.parametrize("case", VARYING)
def test_a_gradient_gives_each_layer_its_own_number(case, folders, tmp_path):
    settings, written = VARYING[case]
    whole, _ = merge(settings | written(NUMBERS), folders, tmp_path / "whole", seed=3)
    for layer, number in enumerate(NUMBERS):
        alone, _ = merge(settings | written(number), folders, tmp_path / f"{layer}", seed=3)
        assert torch.equal(whole[LAYERS[layer]], alone[LAYERS[layer]])
        assert torch.equal(whole["model.embed_tokens.weight"], alone["model.embed_tokens.weight"]) == (layer == 0)
        assert torch.equal(whole["lm_head.weight"], alone["lm_head.weight"]) == (layer == 2)


def test_between_two_stops_lies_a_straight_line(folders, tmp_path):
    out, _ = merge({"method": "slerp", "models": ["a", "b"], "t": [0.1, 0.5]}, folders, tmp_path / "out")
    alone, _ = merge({"method": "slerp", "models": ["a", "b"], "t": 0.3}, folders, tmp_path / "alone")
    assert torch.equal(out[LAYERS[1]], alone[LAYERS[1]])


def test_the_first_rule_that_fits_a_name_counts(folders, tmp_path):
    rules = {"*.layers.1.*": 0.9, "*.mlp.*": [0.1, 0.3], "*": 0.5}
    out, _ = merge({"method": "slerp", "models": ["a", "b"], "t": rules}, folders, tmp_path / "out")
    wanted = {LAYERS[0]: 0.1, LAYERS[1]: 0.9, LAYERS[2]: 0.3, "model.layers.0.self_attn.q_proj.weight": 0.5}
    for name, t in wanted.items():
        alone, _ = merge({"method": "slerp", "models": ["a", "b"], "t": t}, folders, tmp_path / f"{t}")
        assert torch.equal(out[name], alone[name])


def test_a_constant_written_as_rules_or_gradient_is_that_constant(tmp_path):
    parents = relatives(2)
    settings = {"method": "ties", "base": "base", "models": ["a", "b"]}
    plain = streamed(settings | {"density": 0.3}, parents, tmp_path)
    for written in ([0.3], [0.3, 0.3, 0.3], {"*": 0.3}, {"w": 0.3, "*": [0.3, 0.3]}):
        made = streamed(settings | {"density": written}, parents, tmp_path)
        assert all(torch.equal(made[name], plain[name]) for name in plain)


def test_settings_are_written_as_they_were_and_travel():
    raw = {"method": "ties", "base": "x", "models": {"a": [0, 1.0], "b": 2}, "density": {"*.mlp.*": 0.3, "*": [0.5, 1]}}
    made = VERB.parse(raw)
    assert {key: made.plain()[key] for key in raw} == raw
    assert VERB.parse(made.plain()).varied == made.varied
    assert pickle.loads(pickle.dumps(made)).varied == made.varied
    fixed = made.model_copy(update={"density": 0.2})
    assert fixed.plain()["density"] == 0.2
    assert fixed.plain()["models"] == raw["models"]


def test_the_command_a_recipe_and_python_say_the_same(folders, tmp_path):
    a, b = str(folders["a"]), str(folders["b"])
    rules = {"*.mlp.*": [0.1, 0.9], "*": 0.5}
    words = ["merge", str(tmp_path / "cli"), a, b, "--method", "slerp", "--t", json.dumps(rules)]
    assert CliRunner().invoke(app, words).exit_code == 0
    python = graft.merge(tmp_path / "python", method="slerp", models=[a, b], t=rules)
    (tmp_path / "r.yaml").write_text(
        f"family: f\nmodels:\n  a: {{load: {a}}}\n  b: {{load: {b}}}\n"
        f"  m: {{merge: {{method: slerp, models: [a, b], t: {json.dumps(rules)}}}}}\n"
    )
    recipe = graft.run(tmp_path / "r.yaml", tmp_path / "run").folder / "models" / "m"
    expected, _ = merge({"method": "slerp", "models": ["a", "b"], "t": rules}, folders, tmp_path / "out")
    for place in (tmp_path / "cli", python, recipe):
        found = tensors(place)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert json.loads((place / "graft.json").read_text())["settings"]["t"] == rules


TIES = {"method": "ties", "base": "x", "models": {"a": 1, "b": 1}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": [0.1, 1.5]}, "expected a density above 0 and at most 1, found 1.5"),
        ({"density": {"*.mlp.*": 0, "*": 0.5}}, "expected a density above 0 and at most 1, found 0"),
        ({"density": {"a": [0.1, 2], "b": 0.5}}, "expected a density above 0 and at most 1, found 2"),
        ({"density": {"*.mlp.*": 0.3}}, "density: expected `*` as the last pattern, found *.mlp.*"),
        ({"density": {"*": 0.3, "*.mlp.*": 0.3}}, "expected `*` as the last pattern"),
        ({"density": []}, "density: expected a number, a gradient such as [0, 0.5, 1] or rules"),
        ({"density": ["x"]}, "expected a number, a gradient"),
        ({"models": {"a": [True], "b": 1}}, "models.a: expected a number, a gradient"),
        ({"normalise": [True, False]}, "normalise: expected true or false"),
        ({"trim": "model", "density": [0.1, 0.2]}, "density: expected one number, as it is measured over the whole"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(wrong, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        VERB.parse(TIES | wrong)


def test_numbers_that_a_method_does_not_take_together_are_refused_with_the_tensor():
    settings = VERB.parse(
        {
            "method": "della",
            "base": "x",
            "models": ["a"],
            "density": {"*.0.*": 0.9, "*": 0.5},
            "epsilon": {"*up*": 0.2, "*": 0.05},
        }
    )
    places = {name: {"x": name, "a": name} for name in LAYERS}
    with pytest.raises(CannotCombine, match=r"model.layers.0.mlp.up_proj.weight: expected density ± epsilon inside"):
        by_tensor(settings, places)


def test_a_rule_that_fits_no_tensor_is_a_mistake(folders, tmp_path):
    rules = {"*.mpl.*": 0.1, "*": 0.5}
    with pytest.raises(
        CannotCombine, match=r"t: no tensor matches '\*\.mpl\.\*'; the output has, for example, lm_head"
    ):
        merge({"method": "slerp", "models": ["a", "b"], "t": rules}, folders, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
