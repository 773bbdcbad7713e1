"""Ensembles of classifiers: against brute force over the members, as `transformers` models, in recipes."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_ensemble_folder import letters, run
from tiny_members import ENDS, llama, prompts, sharp
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import graft
from graft import lineage, models
from graft._load import VERB as LOAD
from graft.data.examples import Encoder
from graft.ensemble import VERB
from graft.ensemble.model import EnsembleForSequenceClassification, ensemble_of
from graft.ensemble.reading import classes
from graft.ensemble.sources import Source
from graft.ensemble.voting import classify
from graft.errors import CannotCombine, RequestError, RunError
from graft.facts import facts_of
from graft.folders import architecture_of, read_config
from graft.multitask.build import add_head
from graft.multitask.folder import save_heads
from graft.verb import Job

LABELS = {0: "bad", 1: "so-so", 2: "good"}
NAMED = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
WEIGHTS = [0.5, 0.3, 0.2]


def bert(seed, hidden=16, **settings):
    own = {"hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=37, max_position_embeddings=64, pad_token_id=0, **own, **{**NAMED, **settings})
    return sharp(BertForSequenceClassification(config), seed)


def reader(seed):
    own = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sharp(LlamaForSequenceClassification(LlamaConfig(vocab_size=37, **own, **ENDS, **NAMED)), seed)


@pytest.fixture(scope="module")
def members():
    return {"bert": bert(1), "wide": bert(2, hidden=24), "llama": reader(3)}


def texts():
    ids, mask = prompts()
    return ids.flip(1), mask.flip(1)


@torch.no_grad()
def alone(members):
    ids, mask = texts()
    told = [model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1) for model in members.values()]
    return torch.stack(told).numpy()


@pytest.mark.parametrize("rule", ["linear", "log_linear", "majority", "ranked"])
@torch.no_grad()
def test_logits_are_those_of_the_rule_on_each_members_classes(members, rule):
    ids, mask = texts()
    found = ensemble_of(members, WEIGHTS, rule)(input_ids=ids, attention_mask=mask).logits
    assert np.allclose(found.exp().numpy(), np.exp(classify(alone(members), WEIGHTS, rule)), atol=1e-6)
    assert torch.allclose(found.exp().sum(-1), torch.ones(3), atol=1e-5)


@torch.no_grad()
def test_a_mixture_and_a_vote_by_hand(members):
    ids, mask = texts()
    told = np.exp(alone(members))
    mixed = ensemble_of(members, WEIGHTS)(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
    expected = np.einsum("m,mic->ic", WEIGHTS, told)
    assert np.allclose(mixed.logits.exp().numpy(), expected, atol=1e-6)
    assert mixed.loss.item() == pytest.approx(-np.log(expected[np.arange(3), np.arange(3)]).mean(), abs=1e-5)
    votes = ensemble_of(members, WEIGHTS, "majority")(input_ids=ids, attention_mask=mask).logits.exp().numpy()
    for row in range(3):
        counted = [sum(w for w, m in zip(WEIGHTS, told, strict=True) if m[row].argmax() == c) for c in range(3)]
        assert votes[row] == pytest.approx(counted)


@torch.no_grad()
def test_an_ensemble_of_one_is_that_classifier_and_copies_change_nothing(members):
    ids, mask = texts()
    one = members["bert"](input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    assert torch.equal(ensemble_of({"bert": members["bert"]})(input_ids=ids, attention_mask=mask).logits, one)
    three = ensemble_of({str(i): members["bert"] for i in range(3)})
    assert torch.allclose(three(input_ids=ids, attention_mask=mask).logits, one, atol=1e-6)
    inner = ensemble_of({"a": members["bert"], "b": members["wide"]})
    outer = ensemble_of({"inner": inner, "llama": members["llama"]}, [0.8, 0.2])
    flat = ensemble_of(members, [0.4, 0.4, 0.2])
    both = [model(input_ids=ids, attention_mask=mask).logits for model in (outer, flat)]
    assert torch.allclose(*both, atol=1e-5)


@torch.no_grad()
def test_it_is_saved_and_loads_by_the_auto_class_with_its_labels(members, tmp_path):
    ids, mask = texts()
    ensemble = ensemble_of(members, WEIGHTS, "ranked")
    ensemble.save_pretrained(tmp_path / "votes", self_contained=True)
    before = ensemble(input_ids=ids, attention_mask=mask).logits
    for loaded in (
        models.load(tmp_path / "votes"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "votes"),
    ):
        assert isinstance(loaded, EnsembleForSequenceClassification)
        assert torch.equal(loaded(input_ids=ids, attention_mask=mask).logits, before)
        assert loaded.config.id2label == LABELS
        assert loaded.config.num_labels == 3
    assert architecture_of(read_config(tmp_path / "votes")) == "encoder"


def test_a_classifier_that_gives_nan_is_named(members):
    broken = bert(4)
    broken.classifier.weight.data.fill_(float("nan"))
    ids, mask = texts()
    with pytest.raises(RunError, match=r"member 'broken' .*gives NaN logits"):
        ensemble_of({"fine": members["bert"], "broken": broken})(input_ids=ids, attention_mask=mask)


def test_a_text_longer_than_a_member_reads_is_refused_naming_it(members):
    with pytest.raises(RequestError, match="member 'bert' was made for 64 tokens, found a context of 70"):
        ensemble_of({"bert": members["bert"]})(input_ids=torch.ones(1, 70, dtype=torch.long))


def test_other_labels_other_kinds_and_regression_are_refused(members):
    other = bert(5, id2label={0: "good", 1: "so-so", 2: "bad"}, label2id={"good": 0, "so-so": 1, "bad": 2})
    with pytest.raises(RequestError, match="'other' has the labels good, so-so, bad, 'bert' has bad, so-so, good"):
        ensemble_of({"bert": members["bert"], "other": other})
    with pytest.raises(RequestError, match=r"'number': expected a classifier .*found a single output"):
        ensemble_of({"number": bert(6, id2label={0: "x"}, label2id={"x": 0})})
    with pytest.raises(RequestError, match="found classifiers beside decoders"):
        ensemble_of({"bert": members["bert"], "writer": llama()})


@pytest.fixture
def family(members, tmp_path):
    root = tmp_path / "family" / "models"
    for name, model in members.items():
        model.save_pretrained(root / name)
        letters().save_pretrained(root / name)
    return root


def reviews(path, count=40):
    rows = [{"text": f"text {chr(97 + i % 26)}{chr(97 + i // 26)}", "label": LABELS[i % 3]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "jsonl", "path": str(path), "splits": {"dev": 0.6, "test": 0.1}}


@torch.no_grad()
def test_a_recipe_makes_a_vote(family, tmp_path):
    target, found = run(family, {"combine": "majority", "members": {"bert": 0.5, "wide": 0.3, "llama": 0.2}})
    assert found["weights"] == {"bert": 0.5, "wide": 0.3, "llama": 0.2}
    ids, mask = texts()
    loaded = models.load(target)(input_ids=ids, attention_mask=mask).logits
    told = [models.load(family / name)(input_ids=ids, attention_mask=mask).logits for name in ("bert", "wide", "llama")]
    expected = classify(torch.stack(told).numpy(), WEIGHTS, "majority")
    assert np.allclose(loaded.exp().numpy(), np.exp(expected))
    shutil.rmtree(family / "bert")


@pytest.mark.parametrize("rule", ["linear", "log_linear"])
def test_weights_are_fitted_on_labelled_texts(family, rule):
    raw = {"combine": rule, "members": ["bert", "wide", "llama"], "weights": {"fit": "reviews.dev"}}
    target, found = run(family, raw, {"reviews": reviews(family / "reviews.jsonl")})
    assert found["loss"] <= min(found["member_losses"].values()) + 1e-9
    assert models.load(target).config.weights == list(found["weights"].values())
    # of three classes, not of the vocabulary
    gained = sum(each["shapley"] for each in found["contributions"].values())
    assert gained == pytest.approx(np.log(3) - found["loss"], abs=1e-3)


def test_a_gate_of_classifiers_is_fitted(family):
    raw = {"members": ["bert", "wide"], "weights": {"fit": "reviews.dev", "gate": 0}}
    target, found = run(family, raw, {"reviews": reviews(family / "reviews.jsonl")})
    assert found["loss"] < found["loss_without_gate"] + 1e-3
    ids, mask = texts()
    assert models.load(target)(input_ids=ids, attention_mask=mask).logits.shape == (3, 3)


@torch.no_grad()
def test_weights_are_fitted_on_texts_as_classifiers_are_trained_and_evaluated_on_them(family):
    """Between the tokens that begin and end a text, and what a text says of special tokens is text."""
    said = ["ab<eos>cd", "hello"]
    read = classes(Source("bert", family / "bert", "bert"), said, ["bad", "good"])
    rows = Encoder(letters(), 64, list(LABELS.values())).classified([{"text": t, "label": "bad"} for t in said])
    assert [(row["input_ids"] == 2).sum() for row in rows] == [1, 1]
    model = models.load(family / "bert")
    told = torch.cat([model(input_ids=torch.from_numpy(row["input_ids"])[None]).logits for row in rows])
    assert torch.allclose(read.log_probs, told.log_softmax(-1), atol=1e-6)
    assert read.gold.tolist() == [0, 2]


def test_labels_and_data_that_classifiers_do_not_know_are_refused(family):
    raw = {"members": ["bert", "wide"], "weights": {"fit": "reviews.dev"}}
    sets = {"reviews": reviews(family / "reviews.jsonl")}
    sets["reviews"]["fields"] = {"text": "text", "label": "text"}
    with pytest.raises(CannotCombine, match="bert knows the labels bad, so-so, good, found 'text"):
        run(family, raw, sets)
    text = {"source": "jsonl", "path": str(family / "t.jsonl"), "splits": {"dev": 0.5}}
    (family / "t.jsonl").write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(20)))
    with pytest.raises(CannotCombine, match="weights of classifiers are fitted on labelled data, found text"):
        run(family, raw, {"reviews": text}, name="second")


def test_what_classifiers_cannot_do_is_said_before_anything_runs(family):
    facts = {name: facts_of(family / name) for name in ("bert", "wide")}
    gate = {"weights": {"fit": "r.dev", "gate": {"hidden_states": True}}}
    for raw, words in [
        ({"combine": "least_risk"}, "least_risk chooses among texts"),
        ({"draft": "bert"}, "speculation is for decoders, found classifiers"),
        (gate, "a gate sees hidden states of members that write"),
    ]:
        (problem,) = VERB.check(VERB.parse({"members": ["bert", "wide"], **raw}), facts)
        assert words in problem


@pytest.fixture
def heads(tmp_path):
    """Two tasks' heads in the folder of the model whose body they share; what each gives."""
    root, ids = tmp_path / "models" / "multi", texts()[0]
    torch.manual_seed(8)
    body = llama(4)
    made = {
        task: sharp(add_head(body, "classification", ["bad", "good"]), seed) for seed, task in enumerate(("a", "b"))
    }
    body.save_pretrained(root)
    facts = {task: {"name": task, "kind": "classification", "data": task} for task in made}
    save_heads(made, facts, letters(), root, "model")
    letters().save_pretrained(root)
    with torch.no_grad():
        return {task: root / "heads" / task for task in made}, {t: m(input_ids=ids).logits for t, m in made.items()}


@torch.no_grad()
def test_a_head_is_copied_with_the_body_that_it_shares(heads, tmp_path):
    folders, given = heads
    ids = texts()[0]
    settings = LOAD.located(LOAD.parse(str(folders["a"])), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    LOAD.run(Job("one", settings, 0, out, tmp_path / "scratch", tmp_path / "cache", {}, {}, tmp_path))
    kept = lineage.hash_model(folders["a"])
    shutil.rmtree(tmp_path / "models")
    assert lineage.hash_model(out) == kept
    for found in (models.load(out), AutoModelForSequenceClassification.from_pretrained(out)):
        assert torch.equal(found(input_ids=ids).logits, given["a"])


@torch.no_grad()
def test_a_self_contained_ensemble_of_heads_has_their_body(heads, tmp_path):
    folders, given = heads
    graft.ensemble(tmp_path / "votes", members=list(map(str, folders.values())), self_contained=True)
    shutil.rmtree(tmp_path / "models")
    expected = torch.stack([each.softmax(-1) for each in given.values()]).mean(0)
    found = models.load(tmp_path / "votes")(input_ids=texts()[0]).logits.exp()
    assert torch.allclose(found, expected, atol=1e-6)
