"""Who speaks in a mixture over bytes, against the members' byte probabilities."""

import json

import numpy as np
import pytest
from test_byte_ensemble import both, saved
from tiny_bytes import by_hand, member, pair, tokenizer
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


def test_a_product_over_bytes_is_not_shown(tmp_path):
    raw = {"members": ["left", "right"], "vocabulary": "bytes", "combine": "log_linear", "show": "some.dev"}
    facts = {name: facts_of(place) for name, place in saved(tmp_path).items()}
    assert "`show` is for mixtures" in "".join(VERB.check(VERB.parse(raw), facts))
