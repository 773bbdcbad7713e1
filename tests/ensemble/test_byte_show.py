"""Who speaks in a mixture over bytes, against the members' byte probabilities."""

import json

import numpy as np
import pytest
import torch
from test_byte_ensemble import both, saved
from tiny_bytes import LEFT, RIGHT, by_hand, member, pair, tokenizer
from typer.testing import CliRunner

import graft.data
from graft.cli import app
from graft.ensemble import VERB
from graft.ensemble.byte_level.byte_model import EXACT
from graft.ensemble.byte_level.show import speaks
from graft.ensemble.model import ensemble_of
from graft.ensemble.show import page
from graft.ensemble.show import speaks as speaks_in
from graft.ensemble.spoken import FILE, Spoken
from graft.ensemble.weights import fit_log_linear
from graft.errors import RequestError
from graft.facts import facts_of
from graft.verb import Job


def test_shares_are_weights_times_the_probabilities_of_the_bytes():
    spoken = speaks(pair(EXACT), "abca")
    assert (spoken.names, spoken.tokens) == (("left", "right"), ("a", "b", "c", "a"))
    for place, letter in enumerate(b"abca"):
        text = b"abca"[:place]
        probs = [float(each[letter]) for each in both(text)]
        assert np.allclose(spoken.probs[place], probs, atol=1e-5)
        parts = np.array(probs) * (0.6, 0.4)
        assert np.allclose(spoken.shares[place], parts / parts.sum(), atol=1e-4)


def test_a_letter_of_several_bytes_is_one_token_and_what_nobody_writes_is_shared_by_weight():
    words = tokenizer(["a", "é", "b"])
    poor = tokenizer("ab")
    model = ensemble_of(
        {"x": member(1, words), "y": member(2, poor)}, [0.7, 0.3], tokenizers=[words, poor], cover=EXACT
    )
    spoken = speaks(model, "aé!b")
    assert spoken.tokens == ("a", "é", "!", "b")
    assert spoken.shares[1].tolist() == pytest.approx([1, 0])
    assert spoken.probs[1, 1] == 0
    assert spoken.probs[1, 0] == pytest.approx(float(by_hand(member(1, words), words, b"a")["é".encode()[0]]), rel=1e-4)
    assert spoken.shares[2].tolist() == pytest.approx([0.7, 0.3])
    assert np.allclose(spoken.shares.sum(-1), 1)


def test_a_recipes_ensemble_keeps_a_text_and_the_command_shows_any(tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in ["abcab", "cab", "bcabc", "ab"] * 2)
    )
    sets = {"some": graft.data.parse({"source": "jsonl", "path": "text.jsonl", "splits": {"dev": 0.5}})}
    folders = saved(tmp_path)
    raw = {"members": {"left": 0.6, "right": 0.4}, "vocabulary": "bytes", "show": "some.dev"}
    settings = VERB.parse(raw)
    assert VERB.check(settings, {name: facts_of(place) for name, place in folders.items()}) == []
    out = tmp_path / "both"
    out.mkdir()
    VERB.run(Job("both", settings, 0, out, tmp_path / "s", tmp_path / "c", folders, sets, root=tmp_path))
    kept = json.loads((out / FILE).read_text())
    found = Spoken.from_plain(kept)
    again = speaks_in(out, "".join(found.tokens))
    assert kept["on"] == "some.dev"
    assert np.allclose(found.shares, again.shares, atol=1e-5)
    done = CliRunner().invoke(app, ["show", str(out), "--text", "cab", "--html", str(tmp_path / "p.html"), "--json"])
    assert done.exit_code == 0, done.output
    assert [each["token"] for each in json.loads(done.stdout)["tokens"]] == ["c", "a", "b"]
    assert (tmp_path / "p.html").read_text() == page(speaks_in(out, "cab"))
    with pytest.raises(RequestError, match="expected a text"):
        speaks_in(out, "")


def pulled(weights, told, byte):
    """By the formula, of each member, given all probabilities of the next byte `[257]` of each."""
    floored = [each.double().clamp(min=1e-37).log() for each in told]
    product = sum(weight * each for weight, each in zip(weights, floored, strict=True)).softmax(-1)
    return [weight * float(each[byte] - (product * each).sum()) for weight, each in zip(weights, floored, strict=True)]


def test_in_a_product_members_pull_towards_bytes_by_the_formula():
    weights = (1.3, -0.4)
    spoken = speaks(pair(EXACT, "log_linear", weights), "abca")
    assert (spoken.product, spoken.tokens) == (True, ("a", "b", "c", "a"))
    for place, letter in enumerate(b"abca"):
        told = both(b"abca"[:place])
        assert np.allclose(spoken.probs[place], [float(each[letter]) for each in told], atol=1e-5)
        assert spoken.shares[place] == pytest.approx(pulled(weights, told, letter), abs=2e-3)
    assert np.allclose(spoken.weights, weights)


def test_the_pull_towards_a_letter_is_that_towards_all_of_its_bytes():
    words = tokenizer(["a", "é", "b"])
    members = [member(1, words), member(2, words)]
    model = ensemble_of(
        {"x": members[0], "y": members[1]}, [0.7, 0.6], "log_linear", tokenizers=[words, words], cover=EXACT
    )
    spoken = speaks(model, "aé")
    wanted = np.zeros(2)
    for behind, byte in ((b"a", 0xC3), (b"a" + b"\xc3", 0xA9)):
        wanted += pulled((0.7, 0.6), [by_hand(each, words, behind) for each in members], byte)
    assert spoken.tokens == ("a", "é")
    assert spoken.shares[1] == pytest.approx(wanted, abs=2e-3)


def test_a_recipes_product_keeps_a_text_with_who_pulls_and_what_members_contribute(tmp_path):
    texts = ["abcab", "cab", "bcabc", "abb", "cba", "aab"]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts * 2))
    sets = {"some": graft.data.parse({"source": "jsonl", "path": "text.jsonl", "splits": {"dev": 0.5}})}
    cover = {"drop": 0, "join": 0, "most": None}
    raw = {"members": ["left", "right"], "vocabulary": "bytes", "combine": "log_linear", "cover": cover}
    settings = VERB.parse({**raw, "weights": {"fit": "some.dev"}})
    folders = saved(tmp_path)
    out = tmp_path / "both"
    out.mkdir()
    made = VERB.run(Job("both", settings, 0, out, tmp_path / "s", tmp_path / "c", folders, sets, root=tmp_path))
    found = Spoken.from_plain(json.loads((out / FILE).read_text()))
    assert found.product
    assert np.allclose(found.shares, speaks_in(out, "".join(found.tokens)).shares, atol=1e-4)

    read = [record["text"].encode() for record in graft.data.open_corpus(sets, "some", tmp_path).records("dev")]
    told = [
        torch.stack([by_hand(each, words, text[:place]) for text in read for place in range(len(text))]).log()
        for each, words in ((member(1, LEFT, 2), LEFT), (member(5, RIGHT), RIGHT))
    ]
    gold = torch.tensor([byte for text in read for byte in text])
    losses = [fit_log_linear(each, gold).loss for each in (told, told[:1], told[1:])]
    whole, alone, nothing = losses[0], losses[1:], np.log(257)
    for place, (name, part) in enumerate(made["contributions"].items()):
        assert name == ("left", "right")[place]
        assert part["left_out"] == pytest.approx(alone[1 - place] - whole, abs=1e-4)
        first, last = nothing - alone[place], alone[1 - place] - whole
        assert part["shapley"] == pytest.approx((first + last) / 2, abs=1e-4)
        assert part["low"] <= part["left_out"] <= part["high"]
    assert made["error_correlation"]["left"]["right"] == pytest.approx(
        float(np.corrcoef([each.gather(-1, gold[:, None])[:, 0].numpy() for each in told])[0, 1]), abs=1e-4
    )
