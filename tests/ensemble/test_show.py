"""Who speaks: shares against weights times probabilities, and what the terminal and the page say of them."""

import json
import re

import numpy as np
import pytest
import torch
from test_ensemble_folder import facts, family, lines, made, run  # noqa: F401
from tiny_members import gpt2, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.ensemble import VERB
from graft.ensemble.gate import Gate
from graft.ensemble.model import EnsembleConfig, EnsembleForCausalLM, ensemble_of
from graft.ensemble.show import coloured, page, speaks, spoken_by
from graft.ensemble.sources import Source
from graft.ensemble.spoken import FILE, Spoken, colour
from graft.errors import RequestError

TEXT = "a <b> & c"


def letters():
    signs = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz .,\n<>&"]
    inner = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(signs)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("duo")
    members = {"first": llama(), "second": gpt2()}
    ensemble_of(members, [0.7, 0.3]).save_pretrained(place, self_contained=True)
    letters().save_pretrained(place)
    return place


@torch.no_grad()
def test_shares_are_weights_times_probabilities(folder):
    spoken = speaks(folder, TEXT)
    ids = letters()(TEXT)["input_ids"]
    inputs = torch.tensor([[1, *ids[:-1]]])
    told = [0.7 * llama()(input_ids=inputs).logits[0].softmax(-1), 0.3 * gpt2()(input_ids=inputs).logits[0].softmax(-1)]
    parts = torch.stack([each.gather(-1, torch.tensor(ids)[:, None])[:, 0] for each in told], -1)
    assert np.allclose(spoken.shares, (parts / parts.sum(-1, keepdim=True)).numpy(), atol=1e-5)
    assert np.allclose(spoken.weights * spoken.probs, parts.numpy(), atol=1e-6)
    assert "".join(spoken.tokens) == TEXT


def test_the_page_shows_the_text_escaped_and_every_members_part(folder):
    spoken = speaks(folder, TEXT)
    found = re.findall(r'<span style="[^"]*" title="([^"]*)">([^<]*)</span>', page(spoken))
    assert [word for _, word in found] == ["a", " ", "&lt;", "b", "&gt;", " ", "&amp;", " ", "c"]
    assert all(title.count("first: 0.700 ×") == title.count("second: 0.300 ×") == 1 for title, _ in found)
    assert coloured(spoken).plain.startswith(TEXT)


def test_the_command_prints_json_and_writes_the_page(folder, tmp_path):
    done = CliRunner().invoke(app, ["show", str(folder), "--text", TEXT, "--html", str(tmp_path / "p.html"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [each["token"] for each in found["tokens"]] == list(TEXT)
    assert sum(found["mean_shares"].values()) == pytest.approx(1)
    assert (tmp_path / "p.html").read_text() == page(speaks(folder, TEXT))


PRODUCTS = {
    "log_linear": ([0.8, 0.5, -0.4], "log_linear"),
    "experts": ([1.0, 1.5, -1.5], {"experts": {"alpha": 1.5, "top_p": 0.999}}),
    "contrastive": ([1.0, -1.0], {"contrastive": {"plausibility": 1e-6}}),
}


def trio(place, name):
    """A product in a folder, its members' names, and each one's log-probabilities of the text's tokens, by hand."""
    weights, rule = PRODUCTS[name]
    members = dict(list({"first": llama(), "second": gpt2(), "third": llama(5)}.items())[: len(weights)])
    for key, model in members.items():
        model.save_pretrained(place / key)
        letters().save_pretrained(place / key)
    given = {} if isinstance(rule, dict) else {"weights": weights}
    folders = [str(place / key) for key in members]
    raw = dict(zip(folders, weights, strict=True)) if given else folders
    graft.ensemble(place / "product", members=raw, combine=rule)
    ids = letters()(TEXT)["input_ids"]
    inputs = torch.tensor([[1, *ids[:-1]]])
    with torch.no_grad():
        told = [model(input_ids=inputs).logits[0].double().log_softmax(-1).numpy() for model in members.values()]
    return weights, ids, told


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_pulls_in_a_product_are_those_of_the_formula_and_sum_to_what_they_should(tmp_path, name):
    weights, ids, told = trio(tmp_path, name)
    spoken = speaks(tmp_path / "product", TEXT)
    for place, token in enumerate(ids):
        likely = np.exp(models_load(tmp_path / "product", ids)[place])
        by_hand = [w * (each[place, token] - likely @ each[place]) for w, each in zip(weights, told, strict=True)]
        assert spoken.shares[place] == pytest.approx(by_hand, abs=1e-4)
        if likely[token] > 0:
            entropy = -sum(p * np.log(p) for p in likely if p > 0)
            assert sum(by_hand) == pytest.approx(np.log(likely[token]) + entropy, abs=1e-4)
    assert np.allclose(spoken.probs, np.exp([each[range(len(ids)), ids] for each in told]).T, atol=1e-6)
    assert np.allclose(spoken.weights, weights)


def models_load(folder, ids):
    with torch.no_grad():
        return graft.load(folder)(input_ids=torch.tensor([[1, *ids[:-1]]])).logits[0].double().numpy()


def test_what_a_product_shows_is_in_the_terminal_the_page_and_json(tmp_path):
    trio(tmp_path, "log_linear")
    asked = ["ensemble", "show", str(tmp_path / "product"), "--text", TEXT]
    done = CliRunner().invoke(app, [*asked, "--html", str(tmp_path / "p.html"), "--json"])
    assert done.exit_code == 0, done.output
    found, spoken = json.loads(done.stdout), speaks(tmp_path / "product", TEXT)
    assert found["mean_pulls"] == pytest.approx(dict(zip(spoken.names, spoken.shares.mean(0), strict=True)))
    assert set(found["tokens"][0]["members"]["third"]) == {"weight", "probability", "pull"}
    close(Spoken.from_plain(found), spoken)
    titles = re.findall(r'<span style="[^"]*" title="([^"]*)">', (tmp_path / "p.html").read_text())
    assert len(titles) == len(TEXT)
    first = found["tokens"][0]["members"]["third"]
    assert f"third: probability {first['probability']:.3g}, weight -0.400, pulls {first['pull']:+.2f} nats" in titles[0]
    assert f"first {spoken.shares[:, 0].mean():+.2f} nats" in coloured(spoken).plain


def test_a_token_that_no_member_pulls_towards_has_no_colour():
    values = np.array([[-0.5, -0.1], [0.2, -3.0]])
    spoken = Spoken(("a", "b"), ("x", "y"), values, np.ones((2, 2)), np.full((2, 2), 0.1), product=True)
    assert [spoken.speaker(0), spoken.speaker(1)] == [None, 0]
    assert " 0%,transparent" in spoken.words().split("</span>")[0]
    assert next(str(span.style) for span in coloured(spoken).spans) == colour(0)


def test_votes_are_not_shown(tmp_path):
    ensemble_of({"a": llama(), "b": gpt2()}, [0.5, 0.5], "majority").save_pretrained(tmp_path, self_contained=True)
    with pytest.raises(RequestError, match="expected a mixture or a product of decoders"):
        speaks(tmp_path, TEXT)


@pytest.mark.parametrize("combine", ["log_linear", {"experts": {"alpha": 0.5, "top_p": 0.9}}])
def test_a_recipes_product_keeps_a_text_with_who_pulls(family, combine):  # noqa: F811
    raw = {"combine": combine, "members": ["llama", "gpt2", "qwen"], "show": "text.dev"}
    if combine == "log_linear":
        raw |= {"weights": {"fit": "text.dev"}}
    target, found = run(family, raw, {"text": lines(family / "t.jsonl", 60)})
    kept = json.loads((target / FILE).read_text())
    close(Spoken.from_plain(kept), speaks(target, "".join(each["token"] for each in kept["tokens"])))
    if combine == "log_linear":
        assert set(found["contributions"]) == {"llama", "gpt2", "qwen"}
        values = [each["shapley"] for each in found["contributions"].values()]
        assert sum(values) == pytest.approx(np.log(37) - found["loss"], abs=1e-3)
        assert all(each["left_out"] >= -1e-5 for each in found["contributions"].values())


def close(one, other):
    assert one.names == other.names
    assert one.tokens == other.tokens
    for name in ("shares", "weights", "probs"):
        assert np.allclose(getattr(one, name), getattr(other, name), atol=1e-5)


def test_who_speaks_is_told_by_members_one_after_the_other_as_by_the_ensemble(folder):
    sources = [Source(name, folder / "members" / name, name) for name in ("first", "second")]
    for source in sources:
        letters().save_pretrained(source.folder)
    close(spoken_by(sources, [0.7, 0.3], None, TEXT), speaks(folder, TEXT))


def test_it_is_kept_and_read_again(folder):
    spoken = speaks(folder, TEXT)
    close(Spoken.from_plain(json.loads(json.dumps(spoken.plain()))), spoken)


@pytest.mark.parametrize("gate", [None, {"looks_at": ["llama"], "hidden_states": True, "skip": 0.05}])
def test_a_recipes_ensemble_keeps_a_text_with_who_speaks_in_it(family, gate):  # noqa: F811
    weights = {"fit": "text.dev", **({"gate": gate} if gate else {})}
    target, _ = run(family, {"members": ["llama", "gpt2"], "weights": weights}, {"text": lines(family / "t.jsonl", 60)})
    kept = json.loads((target / FILE).read_text())
    assert kept["on"] == "text.dev"
    text = "".join(each["token"] for each in kept["tokens"])
    assert text.startswith("the line number ")
    close(Spoken.from_plain(kept), speaks(target, text))


def test_given_weights_show_what_is_asked_for_and_votes_cannot(family):  # noqa: F811
    sets = {"text": lines(family / "t.jsonl", 60)}
    target, _ = run(family, {"members": ["llama", "gpt2"], "show": "text.test"}, sets)
    assert json.loads((target / FILE).read_text())["on"] == "text.test"
    plain, _ = run(family, {"members": ["llama", "gpt2"]}, sets, name="plain")
    assert not (plain / FILE).exists()
    raw = {"combine": "majority", "members": ["llama", "gpt2"], "show": "text.test"}
    (problem,) = VERB.check(VERB.parse(raw), facts(family, "llama", "gpt2"))
    assert "`show` is for mixtures and products (linear, log_linear, experts, contrastive)" in problem


def test_a_member_that_a_gate_never_uses_keeps_its_place():
    ensemble = ensemble_of({"a": llama(), "b": gpt2(), "c": llama(5)})
    gate = Gate(3, inputs=2, looks_at=[0], skip=0.1)
    with torch.no_grad():
        gate.outer.bias[1] = -20
    config = EnsembleConfig(ensemble.config.members, "linear", [0.6, 0.0, 0.4], {}, gate.plain())
    gated = EnsembleForCausalLM(config, list(ensemble.members)).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    found = gated.generate(ids, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(found, gated.generate(ids, max_new_tokens=5, eos_token_id=None, use_cache=False))
