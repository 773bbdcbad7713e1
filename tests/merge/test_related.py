"""What may be merged where nothing but weights tells of the start: in a recipe, by command, and as it runs."""

import json

import pytest
import torch
from small_family import merge, model, save, tensors
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.errors import CannotCombine, RecipeError
from graft.facts import facts_of
from graft.lineage import Manifest, hash_model, read_manifest, write_manifest
from graft.recipe import read_recipe
from graft.vocabulary import vocabulary_hash

SOUP = {"method": "linear", "models": ["a", "b"]}


@torch.no_grad()
def permuted(made, seed=0):
    """The same function, with its feed-forward channels in another order."""
    order = torch.randperm(made.config.intermediate_size, generator=torch.Generator().manual_seed(seed))
    for layer in made.model.layers:
        layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[order].clone())
        layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[order].clone())
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    a = model(0)
    made = {
        "a": a,
        "b": model(1, near=a, step=0.004),
        "stranger": model(7),
        "permuted": permuted(model(2, near=a, step=0.004)),
    }
    return {name: save(one, root / name) for name, one in made.items()}


def marked(folder, initialisation):
    """A manifest that names this start."""
    write_manifest(
        folder,
        Manifest(
            name=folder.name, verb="tune", verb_version=1, key=folder.name, hash=hash_model(folder), parameters=1,
            initialisation=initialisation, vocabulary=vocabulary_hash(folder), architecture="decoder",
        ),
    )  # fmt: skip
    return folder


def recipe(root, folders, merged, more=""):
    (root / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 8)
    nodes = "".join(f"  {name}: {{load: {folder}}}\n" for name, folder in folders.items())
    head = f"family: f\ndata:\n  d: {{source: jsonl, path: text.jsonl}}\nmodels:\n{nodes}"
    path = root / "recipe.yaml"
    path.write_text(f"{head}{more}  s: {{merge: {merged}}}\n")
    return path


def test_a_recipe_that_loads_strangers_is_refused_before_anything_is_made(folders, tmp_path):
    both = {"x": folders["a"], "y": folders["stranger"]}
    with pytest.raises(RecipeError, match=r"the weights of y and x have a correlation.*rebasin.*`anyway: true`"):
        read_recipe(recipe(tmp_path, both, "{models: [x, y]}"))
    relatives = {"x": folders["a"], "y": folders["b"]}
    assert "s" in read_recipe(recipe(tmp_path, relatives, "{models: [x, y]}")).models


def test_so_is_one_that_tunes_them_first_and_one_that_needs_alignment(folders, tmp_path):
    tuned = "".join(f"  t{n}: {{tune: {{from: {n}, data: d, budget: 1 steps}}}}\n" for n in "xy")
    both = {"x": folders["a"], "y": folders["stranger"]}
    with pytest.raises(RecipeError, match="the weights of ty and tx have a correlation"):
        read_recipe(recipe(tmp_path, both, "{models: [tx, ty]}", tuned))
    both["y"] = folders["permuted"]
    with pytest.raises(RecipeError, match=r"y and x are related, but rows of .* stand in another order.*rebasin"):
        read_recipe(recipe(tmp_path, both, "{models: [x, y]}"))
    assert "s" in read_recipe(recipe(tmp_path, both, "{method: rebasin, models: [x, y]}")).models


def test_what_is_overridden_in_a_recipe_by_command_and_in_python_is_marked(folders, tmp_path):
    both = {"x": folders["a"], "y": folders["stranger"]}
    run = graft.run(recipe(tmp_path, both, "{models: [x, y], anyway: true}"), tmp_path / "run")
    models = run.folder / "models"
    assert "y and x have a correlation" in read_manifest(models / "s").forced[0]
    # copies of the run are as unknown as what they were copied from
    words = ["merge", str(tmp_path / "o"), str(models / "x"), str(models / "y")]
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, "--anyway" in refused.stderr, (tmp_path / "o").exists()) == (2, True, False)
    # anew is another thing than anyway
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 2
    made = CliRunner().invoke(app, [*words, "--anyway", "--json"])
    assert len(json.loads(made.stdout)["forced"]) == 1
    by_call = graft.merge(tmp_path / "p", models=[models / "x", models / "y"], anyway=True)
    assert len(read_manifest(by_call).forced) == 1
    soup, mean = tensors(by_call), [tensors(models / name) for name in "xy"]
    assert all(torch.allclose(soup[name], (mean[0][name] + mean[1][name]) / 2, atol=1e-6) for name in soup)


def test_manifests_with_two_unknown_starts_are_judged_by_the_weights_as_it_runs(folders, tmp_path):
    own = {name: save(model(seed), tmp_path / name) for name, seed in (("a", 0), ("b", 7))}
    for name, folder in own.items():
        marked(folder, f"unknown:{name}")
    with pytest.raises(CannotCombine, match="b and a have a correlation of"):
        merge(SOUP, own, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    marked(own["b"], "unknown:a")
    _, found = merge(SOUP, own, tmp_path / "one_start")
    assert "correlation_of_weights" not in found["notes"]


def test_permuted_relatives_are_refused_until_they_are_aligned(folders, tmp_path):
    own = {"a": folders["a"], "b": folders["permuted"]}
    with pytest.raises(
        CannotCombine, match=r"b and a are related, but rows of .*`method: rebasin` matches their units"
    ):
        merge(SOUP, own, tmp_path / "plain")
    _, forced = merge(SOUP | {"anyway": True}, own, tmp_path / "anyway")
    assert "stand in another order" in forced["forced"][0]
    aligned, found = merge(SOUP | {"method": "rebasin"}, own, tmp_path / "aligned")
    assert found["forced"] == []
    near = tensors(folders["a"])
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.corrcoef(torch.stack([aligned[up].flatten(), near[up].flatten()]))[0, 1] > 0.95


def test_where_a_start_is_unknown_its_facts_say_where_it_lies(folders, tmp_path):
    assert facts_of(folders["a"]).start == folders["a"]
    known = marked(save(model(0), tmp_path / "known"), "of:1")
    assert facts_of(known).start is None


def test_one_folder_under_two_names_is_one_model(folders, tmp_path):
    own = folders | {"b": folders["a"].parent / "stranger" / ".." / "a"}
    with pytest.raises(CannotCombine, match="expected each model once, found a and b, which are one folder"):
        merge(SOUP, own, tmp_path / "out")
    twice = [str(own["a"]), str(own["b"])]
    for words in (twice, [twice[0], "--base", twice[1], "--method", "task_arithmetic"]):
        shown = CliRunner().invoke(app, ["merge", str(tmp_path / "o"), *words])
        assert (shown.exit_code, "which are one folder" in shown.stderr) == (2, True)


def test_density_and_gamma_are_shares_of_one_whole():
    asked = {"base": "base", "models": ["a"], "density": 0.9, "gamma": 0.2}
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        with pytest.raises(Exception, match=r"at most 1 together, found 0.9 and 0.2"):
            graft.verbs.verb("merge").parse(asked | {"method": method})
        fine = graft.verbs.verb("merge").parse(asked | {"method": method, "gamma": 0.1})
        assert fine.gammas == [0.1]
    usual = {key: value for key, value in asked.items() if key != "gamma"} | {"method": "breadcrumbs"}
    for density, gamma in ((0.5, 0.01), (0.995, 0.005), (1, 0)):
        parsed = graft.verbs.verb("merge").parse(usual | {"density": density})
        assert parsed.gammas == [pytest.approx(gamma)]
