"""What is trained with the objective `prefix` says so, as long as it is true, and is read as it was trained."""

import json
import random

import pytest

import graft
from graft import models
from graft.errors import RecipeError
from graft.evaluate.scorer import Scorer
from graft.prefix_lm import mark

WORDS = ["red", "blue", "green", "grey", "black", "white"]
SMALL = "hidden: 32, layers: 2, heads: 4, length: 32, batch_size: 16"
RECIPE = """
family: prefixes
data:
  c: {source: jsonl, path: c.jsonl, splits: {dev: 0, test: 0}}
models:
  base: {pretrain: {data: c, objective: prefix, tokenizer: {size: 300}, %s, learning_rate: 0.01, budget: %s steps}}
  more: {tune: {from: base, data: c, budget: 2 steps, batch_size: 4}}
  causal: {tune: {from: base, data: c, objective: causal, budget: 2 steps, batch_size: 4}}
  apart: {tune: {from: causal, data: c, objective: prefix, method: {lora: {rank: 2}}, budget: 2 steps, batch_size: 4}}
  back: {tune: {from: base, data: c, objective: causal, method: {lora: {rank: 2}}, budget: 2 steps, batch_size: 4}}
  soup: {merge: {method: linear, models: [base, more]}}
  mixed: {merge: {method: linear, models: [base, causal]}}
  duo: {ensemble: {combine: linear, members: [base, causal]%s}}
"""


def family(folder, steps=2, more=""):
    draw = random.Random(0)
    lines = [" ".join(draw.sample(WORDS, 4)) for _ in range(200)]
    rows = [{"prompt": f"{line}:", "completion": f" {line}"} for line in lines]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(RECIPE % (SMALL, steps, more))
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefixes")
    rows = family(folder, 200)
    graft.run(folder / "r.yaml", out=folder / "run")
    return folder / "run" / "models", rows


def test_a_configuration_says_prefix_lm_as_long_as_it_is_true(made):
    said = {name: json.loads((made[0] / name / "config.json").read_text()).get("prefix_lm") for name in
            ("base", "more", "causal", "apart", "back", "soup", "mixed")}  # fmt: skip
    assert said == {
        "base": True, "more": True, "causal": None, "apart": True, "back": None, "soup": True, "mixed": None
    }  # fmt: skip
    for name, value in said.items():
        assert getattr(models.load(made[0] / name).config, "prefix_lm", None) == value
    notes = json.loads((made[0] / "mixed" / "graft.json").read_text())["notes"]
    assert notes["prefix_lm"] == "causal read from left to right, and so does the merge"


def test_it_scores_better_as_it_was_trained_than_read_from_left_to_right(made):
    folder, rows = made
    asked = [(row["prompt"], row["completion"]) for row in rows[:40]]
    model, tokenizer = models.load(folder / "base"), models.load_tokenizer(folder / "base")
    trained = sum(answer.log_prob for answer in Scorer(model, tokenizer).loglikelihoods(asked))
    mark(model, False)
    causal = sum(answer.log_prob for answer in Scorer(model, tokenizer).loglikelihoods(asked))
    assert trained > causal + 2


@pytest.mark.parametrize("more", [", vocabulary: bytes", ", draft: base"])
def test_where_nobody_says_where_a_prompt_ends_it_is_no_member(tmp_path, more):
    family(tmp_path, more=more)
    with pytest.raises(RecipeError, match="base is a prefix LM, which reads a prompt both ways, and "):
        graft.plan(tmp_path / "r.yaml")
