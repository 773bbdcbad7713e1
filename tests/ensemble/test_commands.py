"""What one does with ensembles on the command line: fit, show, gains; votes, translators, whole outputs."""

import json
import shutil

import pytest
import torch
from test_classification import bert
from test_ensemble_folder import family, letters, lines, made  # noqa: F401
from test_seq2seq import differential, pairs, signs, source, t5
from tiny_members import gpt2, llama, prompts
from typer.testing import CliRunner

import graft
from graft import models
from graft.cli import app
from graft.ensemble.telling import lines as told


def graft_(*words, code=0):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, done.output
    return done.stdout


def fitted(folder):
    return json.loads((folder / "graft.json").read_text())["metrics"]


def text_file(folder, count=60):
    lines(folder / "held-out.jsonl", count)
    return folder / "held-out.jsonl"


def test_fit_show_and_gains_behind_the_verb(family):  # noqa: F811
    text = text_file(family)
    members = [family / "llama", family / "gpt2"]
    shown = graft_("ensemble", "fit", family / "fitted", *members, "--on", text, "--documents", 20)
    found = fitted(family / "fitted")
    assert "nats a token on what the weights were fitted to; the best member alone" in shown
    assert f"weight {found['weights']['llama']:+.3f}" in shown
    assert "missed by" in shown
    assert "Shapley" in shown
    (use,) = json.loads((family / "fitted" / "graft.json").read_text())["data"]
    assert [(content["low"], content["high"]) for content in use["contents"]] == [(0.0, 1.0)]
    same = graft.ensemble(family / "same", members=list(map(str, members)), weights={"fit": str(text), "documents": 20})
    assert fitted(same)["weights"] == found["weights"]
    spoken = json.loads(graft_("ensemble", "show", family / "fitted", "--text", "the line", "--json"))
    assert "".join(each["token"] for each in spoken["tokens"]) == "the line"
    assert json.loads(graft_("ensemble", "gains", *members, "--on", text, "--json"))["documents"] > 1


def test_a_product_and_a_gate_are_fitted_from_the_command_line(family):  # noqa: F811
    text, members = text_file(family), [family / "llama", family / "gpt2"]
    words = ["--combine", "log_linear", "--top-k", 8]
    shown = graft_("ensemble", "fit", family / "product", *members, "--on", text, *words)
    assert "loss about (from 8 tokens and a tail) " in shown
    assert json.loads((family / "product" / "config.json").read_text())["combine"] == "log_linear"
    shown = graft_("ensemble", "fit", family / "gated", *members, f"--on={text}", "--gate", "0")
    assert "without the gate" in shown
    assert models.load(family / "gated").gate is not None


def test_fitting_without_text_is_refused(family):  # noqa: F811
    graft_("ensemble", "fit", family / "fitted", family / "llama", family / "gpt2", code=2)
    assert not (family / "fitted").exists()
    graft_("ensemble", "fit", "--help")


def test_weights_that_are_given_need_no_words_and_single_members_no_shapley():
    assert told({"weights": {"a": 0.5, "b": 0.5}}) == []
    metrics = {"weights": {"a": 1.0}, "loss": 2.0, "member_losses": {"a": 2.0}}
    assert told(metrics)[1] == "  a  weight +1.000  alone 2.0000"


@pytest.fixture
def classifiers(tmp_path):
    for name, model in {"first": bert(1), "second": bert(2), "third": bert(3)}.items():
        model.save_pretrained(tmp_path / name)
        letters().save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("rule", ["majority", "ranked"])
def test_a_vote_of_classifiers_by_command(classifiers, rule):
    graft_(
        "ensemble", classifiers / "vote", *(classifiers / n for n in ("first", "second", "third")), "--combine", rule
    )
    vote = models.load(classifiers / "vote")
    ids, mask = prompts()
    ids, mask = ids.flip(1), mask.flip(1)
    with torch.no_grad():
        told_ = torch.stack([models.load(classifiers / n)(input_ids=ids, attention_mask=mask).logits
                             for n in ("first", "second", "third")])  # fmt: skip
        found = vote(input_ids=ids, attention_mask=mask).logits.exp()
    if rule == "majority":
        points = torch.nn.functional.one_hot(told_.argmax(-1), 3).float().sum(0)
    else:
        points = told_.argsort(-1).argsort(-1).float().sum(0)
    assert torch.allclose(found, points / points.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("rule", ["majority", "ranked", "least_risk"])
def test_whole_outputs_by_command_are_chosen_and_written(family, rule):  # noqa: F811
    members = [family / name for name in ("llama", "gpt2", "mistral")]
    graft_("ensemble", family / "answers", *members, "--combine", rule)
    words = ["--prompt", "ab", "--max-tokens", 5, "--temperature", 0]
    said = graft_("chat", family / "answers", *words)
    answer = graft_("chat", family / "answers", *words, "--json")
    assert json.loads(answer)["answer"] == said.removesuffix("\n")
    options = json.loads((family / "answers" / "config.json").read_text())
    assert options["combine"] == rule


def test_domain_differential_adaptation_by_command(tmp_path):
    decoders = {"inside": llama(5, bos_token_id=None), "outside": llama(6, bos_token_id=None)}
    for name, model in {"translator": t5(1), **decoders}.items():
        model.save_pretrained(tmp_path / name)
        signs().save_pretrained(tmp_path / name)
    names = ("translator", "inside", "outside")
    graft_("ensemble", tmp_path / "moved", *(tmp_path / n for n in names), "--combine", "{experts: {alpha: 0.7}}")
    moved, parts = models.load(tmp_path / "moved"), [models.load(tmp_path / n) for n in names]
    ids, mask = source()
    target = torch.cat([torch.ones(3, 1, dtype=torch.long), prompts(padded=())[0][:, :4]], 1)
    with torch.no_grad():
        found = moved(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    assert torch.allclose(found, differential(*parts, 0.7, ids, mask, target), atol=1e-4)
    pairs(tmp_path / "pairs.jsonl", 60)
    words = [
        "--measure",
        "generation",
        "--set",
        "metrics=[chrf]",
        "--set",
        "max_tokens=8",
        "--out",
        tmp_path / "results",
    ]
    words += ["--on", tmp_path / "pairs.jsonl", "--json"]
    rows = json.loads(graft_("eval", tmp_path / "moved", tmp_path / "translator", *words))
    assert {row["model"] for row in rows if row["kind"] == "score"} == {"moved", "translator"}
    on = tmp_path / "pairs.jsonl"
    graft_(
        "ensemble", "fit", tmp_path / "how-far", *(tmp_path / n for n in names), "--combine", "log_linear", "--on", on
    )
    assert set(fitted(tmp_path / "how-far")["weights"]) == set(names)


def test_adapters_checkpoints_and_passes_by_command(family):  # noqa: F811
    shutil.copytree(family / "gpt2", family / "gpt2" / "checkpoints" / "step-3")
    members = [{"model": str(family / "gpt2"), "checkpoint": "step-3"},
               {"model": str(family / "llama"), "dropout": {"passes": 2, "share": 0.1}}]  # fmt: skip
    graft_("ensemble", family / "mixed", "--members", json.dumps(members), "--self-contained")
    config = json.loads((family / "mixed" / "config.json").read_text())
    assert [each["name"] for each in config["members"]] == ["gpt2-step-3", "llama.1", "llama.2"]
    assert config["weights"] == pytest.approx([0.5, 0.25, 0.25])
    assert gpt2().config.vocab_size == models.load(family / "mixed").config.vocab_size


def test_a_self_contained_ensemble_of_ensembles_is_a_model_like_others(family, tmp_path):  # noqa: F811
    graft_("ensemble", family / "duo", family / "llama", family / "gpt2")
    graft_("ensemble", tmp_path / "bundle", family / "duo", family / "mistral", "--self-contained")
    text = text_file(tmp_path)
    shutil.rmtree(family)
    words = ["--on", text, "--out", tmp_path / "results", "--json"]
    (row,) = [each for each in json.loads(graft_("eval", tmp_path / "bundle", *words)) if each["kind"] == "score"]
    assert row["model"] == "bundle"
    manifest = json.loads((tmp_path / "bundle" / "members" / "duo" / "graft.json").read_text())
    assert {parent["path"] for parent in manifest["parents"]} == {"../duo-llama", "../duo-gpt2"}
