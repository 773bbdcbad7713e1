"""Weights that follow the context over bytes: mixed at every byte, members left out catch up exactly, fitted, shown."""

import json

import numpy as np
import pytest
import torch
from test_byte_ensemble import both, ids_of, saved
from test_gate import looking_at_one, step_by_step
from tiny_bytes import LEFT, RIGHT, member, tokenizer

import graft.data
from graft import models
from graft.ensemble import VERB
from graft.ensemble.byte_level.byte_model import Cover
from graft.ensemble.byte_level.configuration import ByteEnsembleConfig
from graft.ensemble.byte_level.show import speaks
from graft.ensemble.byte_level.tokenizer import PAD
from graft.ensemble.gate import Gate, Told, features
from graft.ensemble.model import EnsembleOverBytes
from graft.facts import facts_of
from graft.verb import Job

EXACT = {"tokenisations": "all", "drop": 0.0, "join": 0.0, "most": None}
SOME = {"tokenisations": "all", "drop": 0.05, "join": 0.2, "most": 4}
THIRD = tokenizer("bca", [("a", "b"), ("ab", "c")])


def gated(gate, cover=EXACT):
    """Two members, or three where the gate gives three weights."""
    trio = {"left": (member(1, LEFT, 2), LEFT), "right": (member(5, RIGHT), RIGHT), "third": (member(8, THIRD), THIRD)}
    size = gate.outer.out_features
    made, words = zip(*list(trio.values())[:size], strict=True)
    entries = [
        {
            "name": name,
            "path": "",
            "hash": "",
            "config": {**each.config.to_dict(), "architectures": ["LlamaForCausalLM"]},
        }
        for name, each in zip(trio, made, strict=False)
    ]
    config = ByteEnsembleConfig(entries, "linear", [1 / size] * size, {}, gate.plain(), cover=cover)
    return EnsembleOverBytes(config, list(made), list(words)).eval()


def some_gate(hidden=4):
    torch.manual_seed(2)
    return Gate(2, hidden)


def counted(ensemble):
    """How many bytes each member is asked about from now on, step by step."""
    asked = {number: [] for number in range(len(ensemble.readers))}
    read = ensemble._read

    def counting(number, cache, ids, places):
        missed = [row[number].missed for row in cache.rows]
        asked[number].append(len(missed[0]) + len(ids[0]))
        return read(number, cache, ids, places)

    ensemble._read = counting
    return asked


@torch.no_grad()
def test_members_are_mixed_by_what_the_gate_makes_of_their_bytes():
    gate = some_gate()
    found = gated(gate)(input_ids=ids_of(b"abca")[0]).logits[0]
    for end in range(1, 5):
        told = [each.log().float() for each in both(b"abca"[:end])]
        weights = gate(features(told))
        wanted = sum(weights[n] * each.exp() for n, each in enumerate(told))
        assert torch.allclose(found[end - 1, :257].exp(), wanted, atol=1e-5)
    assert torch.allclose(found.logsumexp(-1), torch.zeros(4), atol=1e-5)


@pytest.mark.parametrize("cover", [EXACT, SOME])
def test_who_is_left_out_reads_what_it_has_missed_and_then_says_the_same(cover):
    ensemble = gated(looking_at_one(0.3, seed=0), cover)
    ids = torch.tensor([list(b"abcabcacbbcaabcbcabacbca")])
    whole = ensemble(input_ids=ids[:, :-1]).logits
    asked = counted(ensemble)
    stepped = step_by_step(ensemble, ids)
    assert torch.allclose(stepped, whole, atol=1e-4)
    assert asked[1] == [1] * 23
    for number in (0, 2):
        assert 0 < len(asked[number]) < 23
        assert max(asked[number]) > 1


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"do_sample": True}, {}])
def test_decoding_with_members_left_out_is_decoding_without_a_cache(way):
    ensemble = gated(looking_at_one(0.3, seed=0), SOME)
    ids, mask = ids_of(b"abc", b"cabab")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **way}
    torch.manual_seed(3)
    found = ensemble.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(3)
    assert torch.equal(found, ensemble.generate(ids, attention_mask=mask, use_cache=False, **options))


def test_gradients_reach_the_gate_and_nothing_else():
    ensemble = gated(some_gate())
    ids = ids_of(b"abcab")[0]
    ensemble(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in ensemble.gate.parameters())
    assert all(weight.grad is None for each in ensemble.members for weight in each.parameters())


def fitted(folder, gate, cover=EXACT):
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ["abcab", "cab", "bcabc", "acb"] * 2))
    sets = {"some": graft.data.parse({"source": "jsonl", "path": "text.jsonl", "splits": {"dev": 0.5}})}
    folders = saved(folder)
    weights = {"fit": "some.dev", "gate": gate}
    settings = VERB.parse({"members": ["left", "right"], "vocabulary": "bytes", "cover": cover, "weights": weights})
    assert VERB.check(settings, {name: facts_of(place) for name, place in folders.items()}) == []
    out = folder / "both"
    out.mkdir()
    made = VERB.run(Job("both", settings, 0, out, folder / "s", folder / "c", folders, sets, root=folder))
    texts = [record["text"].encode() for record in graft.data.open_corpus(sets, "some", folder).records("dev")]
    return models.load(out), made, texts


@pytest.mark.parametrize("gate", [0, {"units": 4, "looks_at": ["right"], "skip": 0.1}])
@torch.no_grad()
def test_a_recipe_fits_a_gate_whose_loss_is_that_of_the_ensemble_it_makes(tmp_path, gate):
    model, made, texts = fitted(tmp_path, gate)
    assert isinstance(model, EnsembleOverBytes)
    told = [model(input_ids=torch.tensor([[257, *text[:-1]]])).logits[0] for text in texts]
    gold = torch.cat([row[range(len(text)), list(text)] for row, text in zip(told, texts, strict=True)])
    assert made["loss"] == pytest.approx(-float(gold.mean()), abs=1e-4)
    assert made["loss"] <= made["loss_without_gate"] + 1e-3 or model.gate.skip
    assert set(made["needed"]) == {"left", "right"}
    assert sum(made["weights"].values()) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_who_speaks_follows_the_gate_in_memory_and_in_the_folder(tmp_path):
    model, _, _ = fitted(tmp_path, 0)
    spoken = speaks(model, "abca")
    for place in range(1, 4):
        told = [each.log().float() for each in both(b"abca"[:place])]
        weights = model.gate.decide([Told(each) for each in told]).numpy()
        parts = weights * np.array([float(each[b"abca"[place]].exp()) for each in told])
        assert np.allclose(spoken.weights[place], weights, atol=1e-4)
        assert np.allclose(spoken.shares[place], parts / parts.sum(), atol=1e-4)
    kept = json.loads((tmp_path / "both" / "speaks.json").read_text())
    again = speaks(model, "".join(each["token"] for each in kept["tokens"]))
    shares = [[each["members"][name]["share"] for name in ("left", "right")] for each in kept["tokens"]]
    assert np.allclose(shares, again.shares, atol=1e-5)


def test_hidden_states_are_refused_over_bytes_with_the_reason(tmp_path):
    facts = {name: facts_of(place) for name, place in saved(tmp_path).items()}
    gate = {"hidden_states": True}
    raw = {"members": ["left", "right"], "vocabulary": "bytes", "weights": {"fit": "some.dev", "gate": gate}}
    (problem,) = VERB.check(VERB.parse(raw), facts)
    assert "no single state" in problem
    assert "leave `hidden_states` out" in problem


def test_a_gate_over_bytes_is_saved_and_loaded(tmp_path):
    model, _, _ = fitted(tmp_path, 2, vars(Cover()))
    model.save_pretrained(tmp_path / "again", self_contained=True)
    ids = ids_of(b"abcab")[0]
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path / "again")(input_ids=ids).logits, model(input_ids=ids).logits)
