"""Searched merges as people ask for them: in a recipe, on the command line, from Python; killed and gone on with."""

import json

import pytest
import torch
import yaml
from small_family import tensors
from typer.testing import CliRunner

import graft
from graft.errors import RecipeError
from graft.recipe import read_recipe

SETS = {
    "all": {"source": "jsonl", "path": "all.train.jsonl", "dev": "all.jsonl", "splits": {"dev": 0, "test": 0}},
    "up_text": {"source": "jsonl", "path": "up.train.jsonl", "dev": "up.jsonl", "splits": {"dev": 0, "test": 0}},
}


@pytest.fixture
def recipe(root, data, trained, tmp_path):
    """Writes a recipe beside the trained family's data."""

    def write(**nodes):
        models = {name: {"load": str(folder)} for name, folder in trained.items()} | nodes
        path = root / f"{tmp_path.name}.yaml"
        path.write_text(yaml.safe_dump({"family": "searched", "data": SETS, "models": models}, sort_keys=False))
        return path

    return write


TASK = {"method": "task_arithmetic", "base": "base", "models": ["up", "down", "jump"]}


def test_a_recipe_runs_them_and_says_what_they_looked_at(recipe, tmp_path):
    path = recipe(
        soup={"merge": {"method": "greedy_soup", "models": ["up", "down", "jump", "wild"], "on": "all.dev"}},
        task={
            "merge": TASK | {"search": {"over": {"scale": [0, 1]}, "on": ["all.dev", "up_text.dev"], "evaluations": 5}}
        },
    )
    done = graft.run(path, tmp_path / "run")
    assert {"soup", "task"} <= set(done.made)
    manifests = {n: json.loads((tmp_path / "run" / "models" / n / "graft.json").read_text()) for n in ("soup", "task")}
    assert [(use["name"], use["split"]) for use in manifests["soup"]["data"]] == [("all", "dev")]
    assert [(use["name"], use["split"]) for use in manifests["task"]["data"]] == [("all", "dev"), ("up_text", "dev")]
    assert manifests["soup"]["notes"]["greedy_soup"]["decisions"][-1] | {"with": 0, "without": 0, "alone": 0} == {
        "model": "wild", "alone": 0, "with": 0, "without": 0, "taken": False,
    }  # fmt: skip
    assert set(manifests["soup"]["notes"]["config_from"]) <= set("updownjump")
    again = graft.run(path, tmp_path / "run")
    assert again.made == []


def test_a_method_that_reads_data_itself_is_searched_like_any_other(recipe, tmp_path, measured):
    regmean = {"method": "regmean", "models": ["up", "down"], "on": "all.dev", "tokens": 400, "length": 24}
    search = {"over": {"alpha": [0, 0.95]}, "by": "grid", "evaluations": 3, "on": "all.dev"}
    graft.run(recipe(found={"merge": regmean | {"search": search}}), tmp_path / "run", only=["found"])
    folder = tmp_path / "run" / "models" / "found"
    notes = json.loads((folder / "graft.json").read_text())["notes"]["search"]
    assert [one["parameters"]["alpha"] for one in notes["tried"]] == [0.0, 0.475, 0.95]
    assert measured(folder) == notes["best"]
    plain = recipe(plain={"merge": regmean | notes["parameters"]})
    graft.run(plain, tmp_path / "run", only=["plain"])
    other = tensors(tmp_path / "run" / "models" / "plain")
    assert all(torch.equal(value, other[name]) for name, value in tensors(folder).items())


def test_other_data_make_another_merge_and_the_number_of_jobs_does_not(recipe, root, tmp_path):
    search = {"over": {"scale": [0, 1]}, "on": "all.dev", "evaluations": 3}
    graft.run(recipe(task={"merge": TASK | {"search": search}}), tmp_path / "run")
    plan = graft.plan(recipe(task={"merge": TASK | {"search": search | {"jobs": 3}}}), tmp_path / "run")
    assert plan.steps["task"].state == "cached"
    plan = graft.plan(recipe(task={"merge": TASK | {"search": search | {"on": "up_text.dev"}}}), tmp_path / "run")
    assert plan.steps["task"].state == "run"
    with open(root / "all.jsonl", "a") as file:
        file.write('{"text": "hhhh"}\n')
    try:
        plan = graft.plan(recipe(task={"merge": TASK | {"search": search}}), tmp_path / "run")
        assert plan.steps["task"].state == "run"
    finally:
        lines = (root / "all.jsonl").read_text().splitlines(keepends=True)
        (root / "all.jsonl").write_text("".join(lines[:-1]))


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"over": {"scael": [0, 1]}, "on": "all.dev"}, "did you mean 'scale'"),
        ({"over": {"scale": [0, 1]}, "on": "al.dev"}, "unknown data set 'al.dev'"),
        ({"over": {"scale": [0, 1]}, "on": "all.dev", "measure": "classification"}, "expected data of the format"),
        ({"over": {"scale": [0, 1]}, "task": "none.yaml"}, "expected a task's file, found none"),
    ],
)
def test_a_recipe_that_cannot_be_searched_is_refused_before_it_runs(recipe, search, words):
    with pytest.raises(RecipeError, match=words):
        read_recipe(recipe(task={"merge": TASK | {"search": search}}))


def invoke(*words):
    from graft.cli import app

    return CliRunner().invoke(app, [str(word) for word in words])


def test_on_the_command_line_people_read_what_was_decided(root, data, trained, tmp_path):
    out = tmp_path / "soup"
    models = [trained[name] for name in ("up", "wild", "down")]
    words = ("merge", out, *models, "--method", "greedy_soup", "--on", root / "up.jsonl", "--limit", "4")
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    first, *told = done.stdout.splitlines()
    assert first == str(out)
    assert told[0].startswith("greedy soup by bits_per_byte on ")
    assert sum("taken" in line for line in told) >= 1
    assert sum("left" in line for line in told) >= 1
    again = invoke(*words, "--json")
    assert json.loads(again.stdout)["notes"]["greedy_soup"]["metric"] == "bits_per_byte"


def test_a_search_and_the_spread_over_seeds_by_options(root, data, trained, tmp_path):
    pair = [trained["up"], trained["down"], "--base", trained["base"]]
    held = str(root / "up.jsonl")
    done = invoke(
        "merge", tmp_path / "task", *pair, "--method", "task_arithmetic", "--search.over.scale", "[0.1, 1.5]",
        "--search.on", held, "--search.evaluations", "4", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    notes = json.loads(done.stdout)["notes"]["search"]
    assert (notes["by"], len(notes["tried"])) == ("golden", 4)
    # the whole file is read
    assert [use["contents"][0]["low"] for use in json.loads(done.stdout)["data"]] == [0.0]
    done = invoke("merge", tmp_path / "dare", *pair, "--method", "dare_ties", "--seeds", "3", "--seed", "7")
    assert done.exit_code == 0, done.output
    assert "3 seeds: " in done.stdout
    assert "cosine" in done.stdout


def test_python_makes_the_same_merge_as_a_recipe(root, trained, recipe, tmp_path):
    settings = {"base": trained["base"], "models": [trained["up"], trained["down"]]}
    over = {"over": {"scale": [0.2, 0.6]}, "by": "grid", "evaluations": 3, "on": "all.dev"}
    out = graft.merge(tmp_path / "task", method="task_arithmetic", search=over, data_sets=SETS, root=root, **settings)
    graft.run(recipe(task={"merge": TASK | {"models": ["up", "down"], "search": over}}), tmp_path / "run")
    other = tensors(tmp_path / "run" / "models" / "task")
    assert all(torch.equal(value, other[name]) for name, value in tensors(out).items())


@pytest.mark.slow
def test_a_search_whose_process_is_killed_goes_on_and_ends_the_same(root, data, trained, tmp_path, beside):
    """kill -9 in the middle; what had been judged by then is not judged again, and the bytes are the same."""
    pair = [trained["up"], trained["down"], trained["jump"], "--base", trained["base"]]
    search = ["--search.over.scale", "[0.0, 2.0]", "--search.over.density", "[0.1, 1.0]", "--search.evaluations", "25"]
    words = [*pair, "--method", "ties", *search, "--search.on", root / "all.jsonl"]
    whole = invoke("merge", tmp_path / "whole", *words)
    assert whole.exit_code == 0, whole.output
    out = tmp_path / "there" / "killed"
    process = beside.start("from graft.cli import main; main()", "merge", out, *words)
    noted = out.parent / ".graft" / "work" / "killed" / "scratch" / "judged" / "results.jsonl"
    process.kill_when(lambda: noted.is_file() and len(noted.read_text().splitlines()) > 8)
    before = noted.read_text()
    assert 8 < len(before.splitlines()) < 26
    again = invoke("merge", out, *words)
    assert again.exit_code == 0, again.output
    assert again.stdout.splitlines()[1:] == whole.stdout.splitlines()[1:]
    first, second = tensors(tmp_path / "whole"), tensors(out)
    assert all(torch.equal(first[name], second[name]) for name in first)


def facts(architecture="decoder"):
    from graft.verb import Facts

    return Facts(architecture, "i", "v", 1000, 4000, {})


SOUP = {"method": "greedy_soup", "models": ["a", "b"], "on": "d.dev"}


def test_a_measure_that_the_models_cannot_be_taken_by_is_said_before_anything_runs():
    from graft.merge import VERB

    models = {"a": facts("encoder"), "b": facts("encoder")}
    found = VERB.check(VERB.parse(SOUP), models)
    assert found == ["bits_per_byte is taken of decoder models, found encoder: name another measure"]
    assert VERB.check(VERB.parse(SOUP), {"a": facts(), "b": facts()}) == []


def test_what_makes_no_model_is_not_searched():
    from graft.merge import VERB

    raw = {"method": "extract_lora", "base": "b", "models": ["a"], "rank": 2}
    search = {"search": {"over": {"rank": [1, 4]}, "on": "d.dev"}}
    found = VERB.check(VERB.parse(raw | search), {"a": facts(), "b": facts()})
    assert any("extract_lora makes no model" in line for line in found)


def test_the_plan_counts_the_models_that_are_held_to_be_judged():
    from graft.merge import VERB

    models = {name: facts() for name in "ab"}
    plain = VERB.estimate(VERB.parse({"method": "linear", "models": ["a", "b"]}), models)
    one = VERB.estimate(VERB.parse(SOUP), models)
    four = VERB.estimate(VERB.parse(SOUP | {"jobs": 4}), models)
    assert plain.seconds is not None
    assert one.seconds is None
    assert one.memory_bytes - plain.memory_bytes == 8000
    assert four.memory_bytes - plain.memory_bytes == 32000
