"""`report: {ceiling: true}`: every merge beside the ensemble of its models, without a node written for it."""

from __future__ import annotations

import json
import textwrap

import pytest
import small_family

import graft
from graft.errors import RecipeError
from graft.recipe import read_recipe
from graft.report.ceiling import twins
from graft.report.read import read_run

MERGES = """
  soup: {merge: {method: linear, models: [a, b]}}
  sum: {merge: {method: task_arithmetic, base: base, models: [b, a], scale: 0.5}}
  three: {merge: {method: linear, models: [a, b, c]}}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    words = " ".join(f"w{i % 45 + 3}" for i in range(0, 700, 7))
    (root / "d.jsonl").write_text("".join(json.dumps({"text": words[i:]}) + "\n" for i in range(0, 60, 3)))
    return small_family.family(root, 3)


@pytest.fixture
def recipe(folders, tmp_path):
    """Writes a recipe of the loaded family with more models, measures and sections."""

    def write(models=MERGES, more="report: {ceiling: true}", measure=""):
        loads = "".join(f"\n  {name}: {{load: {folder}}}" for name, folder in folders.items())
        data = folders["base"].parent / "d.jsonl"
        text = f"family: f\ndata:\n  d: {{source: jsonl, path: {data}, splits: {{dev: 0, test: 0.5}}}}\nmodels:{loads}"
        text += textwrap.dedent(models).replace("\n", "\n  ").rstrip() + "\n"
        text += f"evaluate:\n  - {{measure: bits_per_byte, on: [d.test]{measure}}}\n{more}\n"
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write


def problems(path):
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    return "\n".join(str(problem) for problem in error.value.problems)


def added(path):
    found = read_recipe(path)
    return {name: set(node.models) for name, node in found.models.items() if node.verb.name == "ensemble"}


def test_merges_of_the_same_models_share_one_ensemble(recipe):
    assert added(recipe()) == {"soup-ceiling": {"a", "b"}, "three-ceiling": {"a", "b", "c"}}


def test_nothing_is_added_where_nothing_is_asked(recipe):
    assert added(recipe(more="")) == {}
    assert added(recipe(more="report: {ceiling: false}")) == {}


def test_merges_may_be_named(recipe):
    assert added(recipe(more="report: {ceiling: [sum]}")) == {"sum-ceiling": {"a", "b"}}


def test_a_plain_ensemble_that_is_written_down_is_the_ceiling(recipe):
    plain = MERGES + "  duo: {ensemble: {combine: linear, members: [b, a]}}\n"
    assert added(recipe(plain)) == {"duo": {"a", "b"}, "three-ceiling": {"a", "b", "c"}}
    weighted = MERGES + "  duo: {ensemble: {combine: linear, members: {a: 0.9, b: 0.1}}}\n"
    assert set(added(recipe(weighted))) == {"duo", "soup-ceiling", "three-ceiling"}
    product = MERGES + "  duo: {ensemble: {combine: log_linear, members: [b, a]}}\n"
    assert set(added(recipe(product))) == {"duo", "soup-ceiling", "three-ceiling"}


def test_a_measure_of_some_models_is_taken_of_their_ensembles(recipe):
    found = read_recipe(recipe(measure=", models: [a, b, sum]"))
    assert [measure.models for measure in found.evaluate] == [["a", "b", "sum", "soup-ceiling"]]
    found = read_recipe(recipe(measure=", models: [a, b]"))
    assert [measure.models for measure in found.evaluate] == [["a", "b"]]


def test_what_has_no_ensemble_is_refused_with_what_to_write(recipe):
    assert "unknown model 'soop' (did you mean 'soup'?)" in problems(recipe(more="report: {ceiling: [soop]}"))
    assert "expected merges of two models or more, found a" in problems(recipe(more="report: {ceiling: [a]}"))
    taken = MERGES + "  soup-ceiling: {merge: {method: linear, models: [a, c]}}\n"
    assert "expected another name: this is that of the ensemble of soup's models" in problems(recipe(taken))
    assert "did you mean 'ceiling'" in problems(recipe(more="report: {cieling: true}"))


def test_models_whose_predictions_do_not_match_are_told_of_at_the_word_that_asked(recipe, folders, tmp_path):
    other = small_family.save(small_family.model(9, near=small_family.model(0)), tmp_path / "other", words=40)
    models = (
        f"\n  other: {{load: {other}}}\n  both: {{merge: {{models: [a, other], method: linear, vocabulary: base}}}}\n"
    )
    found = problems(recipe(models))
    assert (
        "report.ceiling: there is no ensemble of the models of both: other and a have different vocabularies" in found
    )
    assert "name the merges that have one: `ceiling: [NAME, …]`" in found
    read_recipe(recipe(models, more=""))


def test_a_run_measures_parents_merge_and_their_ensemble(recipe, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GRAFT_QUIET")
    result = graft.run(recipe(), tmp_path / "run")
    assert {"soup-ceiling", "three-ceiling"} <= set(result.made)
    assert "soup: configuration, tokenizer and generation settings of a\n" in capsys.readouterr().err
    scores = {row["model"]: row["value"] for row in result.rows if row["kind"] == "score"}
    by_hand = graft.ensemble(tmp_path / "duo", combine="linear", members=[str(folders["a"]), str(folders["b"])])
    held = str(folders["base"].parent / "d.jsonl")
    sets = {"d": {"source": "jsonl", "path": held, "splits": {"dev": 0, "test": 0.5}}}
    asked = [{"measure": "bits_per_byte", "on": ["d.test"]}]
    (row,) = graft.evaluate({"duo": by_hand}, asked, data_sets=sets, out=tmp_path / "alone")
    assert scores["soup-ceiling"] == pytest.approx(row["value"], rel=1e-6)
    # a mixture loses less than its members do in the mean (Jensen)
    assert scores["soup-ceiling"] < (scores["a"] + scores["b"]) / 2
    found = {(twin.merge, twin.ensemble) for twin in twins(read_run(result.folder))}
    assert found == {("soup", "soup-ceiling"), ("sum", "soup-ceiling"), ("three", "three-ceiling")}
    page = result.report.read_text()
    assert "Averaging against ensembling" in page
    assert "What was merged" in page
    again = graft.run(tmp_path / "recipe.yaml", tmp_path / "run")
    assert again.made == []
    assert {row["key"] for row in again.rows} == {row["key"] for row in result.rows}
