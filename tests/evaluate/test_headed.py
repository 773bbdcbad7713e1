"""What heads answer is measured: classes, tags, spans, beside models that write their answers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import graft
from graft import models
from graft.cli import app
from graft.data.examples import Encoder, Window
from graft.errors import RecipeError, RequestError, ScoresFailed
from graft.evaluate.headed import LONGEST_ANSWER, best_span
from graft.evaluate.metrics import entities, text_metric
from graft.multitask.folder import find_head
from graft.recipe import read_recipe

COLOURS = ("red", "green", "blue")
SETS = {
    "colours": [{"text": f"{n} is {COLOURS[n % 3]}", "label": COLOURS[n % 3]} for n in range(90)],
    "names": [{"tokens": ["in", "New", "York", str(n)], "tags": ["O", "B-LOC", "I-LOC", "NUM"]} for n in range(60)],
    "places": [
        {"question": "where?", "context": f"{n} is in {COLOURS[n % 3]} town", "answer": [COLOURS[n % 3]]}
        for n in range(60)
    ],
}
RECIPE = """
family: heads
data:
  colours: {source: jsonl, path: colours.jsonl, splits: {dev: 0.1, test: 0.2}}
  names: {source: jsonl, path: names.jsonl, splits: {dev: 0.1, test: 0.2}}
  places: {source: jsonl, path: places.jsonl, splits: {dev: 0.1, test: 0.2}}
models:
  base:
    pretrain: {data: colours, architecture: encoder, hidden: 32, layers: 1, length: 32, tokenizer: {size: 300},
               budget: 4 steps, batch_size: 4}
  multi:
    tune:
      from: base
      tasks:
        colour: {data: colours, head: classification}
        name: {data: names, head: tagging}
        place: {data: places, head: spans}
      budget: 60 steps
      batch_size: 24
      learning_rate: 1e-2
  colour: {head: {from: multi, task: colour}}
evaluate:
  - {measure: classification, on: [colours.test], models: [multi, colour]}
  - {measure: tagging, on: [names.test], models: [multi], metrics: [token_accuracy, entity_f1]}
  - {measure: spans, on: [places.test], models: [multi]}
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    for name, rows in SETS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heads.yaml").write_text(RECIPE)
    graft.run(folder / "heads.yaml", folder / "run")
    return folder


def rows(folder):
    found = map(json.loads, (folder / "run" / "results.jsonl").read_text().splitlines())
    return {(row["model"], row["metric"]): row for row in found if row["kind"] == "score"}


def test_heads_learn_and_a_run_measures_them(family):
    found = rows(family)
    for metric in ("accuracy", "f1_macro", "token_accuracy", "entity_f1"):
        assert found["multi", metric]["value"] > 0.9, metric
    assert found["multi", "token_f1"]["value"] > 0.3
    assert found["multi", "span_exact_match"]["interval"] == "wilson"


def test_a_head_that_is_split_out_answers_as_it_did(family):
    found = rows(family)
    assert found["colour", "accuracy"]["value"] == found["multi", "accuracy"]["value"]
    alone = models.load(family / "run" / "models" / "colour")
    assert type(alone).__name__ == "ModernBertForSequenceClassification"
    assert not (family / "run" / "models" / "colour" / "heads").exists()


def test_accuracy_is_what_counting_one_by_one_gives(family):
    """Batched and padded = each text alone."""
    head = find_head(family / "run" / "models" / "multi", "classification")
    model, tokenizer = models.load(head.folder), models.load_tokenizer(head.folder)
    raw = {"source": "jsonl", "path": "colours.jsonl", "splits": {"dev": 0.1, "test": 0.2}}
    records = list(graft.data.open_corpus({"c": graft.data.parse(raw)}, "c", family).records("test"))
    import torch

    right = 0
    for row, record in zip(Encoder(tokenizer, 32, head.labels).classified(records), records, strict=True):
        logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0]
        right += model.config.id2label[int(logits.argmax())] == record["label"]
    assert rows(family)["multi", "accuracy"]["value"] == pytest.approx(right / len(records))


def test_the_commands_split_and_measure(family, monkeypatch):
    monkeypatch.chdir(family)
    done = CliRunner().invoke(app, ["head", "tagger", "--from", "run/models/multi", "--task", "name"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(
        app, ["eval", "tagger", "--measure", "tagging", "--on", "names.test", "--recipe", "heads.yaml", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert '"token_accuracy"' in done.output
    wrong = CliRunner().invoke(app, ["head", "other", "--from", "run/models/multi", "--task", "nam"])
    assert wrong.exit_code == 2
    assert "it has colour, name, place" in " ".join(wrong.output.split())


def test_the_command_says_what_can_be_measured_of_an_encoder(family, monkeypatch):
    monkeypatch.chdir(family)
    for name, advice in (
        ("multi", "take classification or tagging or spans of multi (`measure`, --measure)"),
        ("base", "of an encoder its heads are measured"),
    ):
        wrong = CliRunner().invoke(
            app, ["eval", f"run/models/{name}", "--on", "colours.test", "--recipe", "heads.yaml"]
        )
        assert wrong.exit_code == 2
        expected = f"expected models of the architecture decoder, found {name} (encoder): {advice}"
        assert wrong.stderr.splitlines()[-1] == f"graft: {expected}"


def test_which_head_is_found_by_data_task_or_being_the_only_one(family):
    multi = family / "run" / "models" / "multi"
    assert find_head(multi, data="names").task == find_head(multi, task="name").task == "name"
    with pytest.raises(RequestError, match="expected one head, found colour"):
        find_head(multi)
    with pytest.raises(RequestError, match="did you mean 'name'"):
        find_head(multi, task="names")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("on: [names.test], models: [multi]", "on: [names.test], models: [base]", "or with a head for tagging"),
        ("on: [names.test], models: [multi]", "on: [colours.test], models: [multi]", "format tagged, found labelled"),
        ("task: colour}", "task: color}", "it has colour, name, place"),
        ("{from: multi, task: colour}", "{from: base}", "tune it on `tasks`"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(family, old, new, words):
    assert old in RECIPE
    (family / "wrong.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        read_recipe(family / "wrong.yaml")


# -- metrics


def test_entities_of_iob_tags():
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-PER", "O", "I-ORG"]
    assert entities(tags) == {("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4), ("PER", 5, 5), ("ORG", 7, 7)}


def brute_entities(tags):
    """Every run of one type that begins with B- or where the type changes and goes on while I- of its type follow."""
    found, place = set(), 0
    while place < len(tags):
        if tags[place] == "O":
            place += 1
            continue
        kind, last = tags[place][2:], place
        while last + 1 < len(tags) and tags[last + 1] == f"I-{kind}":
            last += 1
        found.add((kind, place, last))
        place = last + 1
    return found


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), min_size=1, max_size=12))
def test_entities_are_those_of_the_definition(tags):
    assert entities(tags) == brute_entities(tags)


def test_f1_of_entities_is_over_all_items():
    metric, sums = text_metric("entity_f1", ["B-A O B-B", "O O"], [["B-A O B-A"], ["B-A I-A"]])
    assert float(metric.value(sums.sum(0, keepdims=True))[0]) == pytest.approx(2 * 1 / (2 + 3))
    metric, sums = text_metric("entity_f1", ["O"], [["O"]])
    assert float(metric.value(sums)[0]) == 0


def test_tags_that_are_missing_are_wrong():
    metric, sums = text_metric("token_accuracy", ["A B", "A"], [["A C"], ["A B C"]])
    assert float(metric.value(sums.sum(0, keepdims=True))[0]) == pytest.approx(2 / 5)


def test_spans_are_matched_as_squad_does():
    metric, sums = text_metric("span_exact_match", ["The  Cat!", "dog"], [["a dog", "cat"], ["cat"]])
    assert sums[:, 0].tolist() == [1, 0]
    assert metric.proportion


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 5))
def test_the_best_span_is_that_of_trying_all(seed, count, first):
    random = np.random.default_rng(seed)
    start, end = random.normal(size=(2, first + count + 1))
    window = Window({}, first, np.zeros((count, 2)))
    tried = {
        (a, b): start[first + a] + end[first + b] - start[0] - end[0]
        for a in range(count)
        for b in range(a, min(count, a + LONGEST_ANSWER))
    }
    value, span = best_span(start, end, window)
    assert span == max(tried, key=lambda pair: tried[pair])
    assert value == pytest.approx(tried[span])


def test_heads_and_models_that_write_are_compared_over_the_same_labels(family):
    """Of the head's labels only those of the data count, as for a model that chooses one of the labels by its text."""
    recipe = RECIPE.replace(
        "models: [multi, colour]}", "models: [multi, colour], limit: 2, labels: [red, green, blue]}"
    )
    recipe += "  - {measure: classification, on: [colours.test], models: [multi], labels: [red, green, blue, mauve]}\n"
    (family / "labels.yaml").write_text(recipe)
    graft.run(family / "labels.yaml", family / "run")
    assert rows(family)["multi", "accuracy"]["value"] > 0.9
    wrong = recipe.replace("red, green, blue, mauve", "mauve, pink")
    (family / "labels.yaml").write_text(wrong)
    with pytest.raises(ScoresFailed, match=r"multi on colours\.test: .* knows \(blue, green, red\), found mauve, pink"):
        graft.run(family / "labels.yaml", family / "run")
