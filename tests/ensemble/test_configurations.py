"""What an ensemble's folder or a call says is looked at before anything is computed with it."""

import errno
import json
import shutil

import pytest
import torch
from test_ensemble_folder import family, letters, made, run  # noqa: F401
from tiny_members import ENDS, TOKENS, gpt2, llama, prompts, qwen, sharp
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import graft
from graft import models
from graft.ensemble.gate import Gate
from graft.ensemble.model import ensemble_of
from graft.errors import CannotCombine, CheckpointError, DiskError, GraftError, RequestError


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def saved(tmp_path):
    ensemble = ensemble_of({"llama": llama(), "gpt2": gpt2()}, [0.6, 0.4])
    ensemble.save_pretrained(tmp_path / "saved", self_contained=True)
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"weights": [0.6, 0.6]},
            r"must sum to one, found \[0\.6, 0\.6\], which sum to 1\.2; normalised .* \[0\.5, 0\.5",
        ),
        ({"weights": [1.4, -0.4]}, "a mixture needs weights of zero or more"),
        ({"weights": [float("nan"), 1.0]}, r"expected a weight for each of 2 members, found \[nan, 1\.0\]"),
        ({"weights": [1.0]}, r"expected a weight for each of 2 members, found \[1\.0\]"),
        ({"weights": ["much", "little"]}, "expected a weight for each of 2 members, found"),
        ({"members": []}, "expected an ensemble's members, found"),
        ({"members": 3}, "expected an ensemble's members, found '3'"),
        ({"members": [{"name": "llama"}]}, "expected name, path and config of member 0, found name"),
        ({"gate": {"hidden": 0}}, "expected a gate that gives 2 members their weights, found one for 0"),
        ({"gate": Gate(1).plain()}, "a gate that gives 2 members their weights, found one for 1"),
        ({"draft": "lama"}, r"expected a member as draft \(llama, gpt2\), found 'lama'"),
        ({"combine": "linaer"}, "did you mean 'linear'"),
    ],
)
@pytest.mark.parametrize("load", [graft.load, AutoModelForCausalLM.from_pretrained], ids=["graft", "auto"])
def test_a_configuration_that_was_edited_into_nothing_that_works_is_refused(saved, load, changes, words):
    with pytest.raises(GraftError, match=words):
        load(edited(saved, **changes))


@torch.no_grad()
def test_a_self_contained_ensemble_may_be_written_over_itself(saved):
    ids, _ = prompts(padded=())
    before = graft.load(saved)
    told = before(ids).logits
    before.save_pretrained(saved, self_contained=True)
    assert sorted(path.name for path in (saved / "members").iterdir()) == ["gpt2", "llama"]
    assert torch.equal(graft.load(saved)(ids).logits, told)


def test_attention_is_computed_as_is_asked_and_weights_from_outside_are_refused(saved):
    found = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert [member.config._attn_implementation for member in found.members] == ["eager", "eager"]
    with pytest.raises(RequestError, match="cannot honour state_dict"):
        AutoModelForCausalLM.from_pretrained(saved, state_dict=found.state_dict())


@pytest.mark.parametrize(
    ("members", "weights", "words"),
    [
        ({}, None, "expected a member, found none"),
        ({"a": "models/a"}, None, "member 'a': expected a model of transformers, found str: load its folder"),
        ({"a": llama(), "b": qwen()}, ["half", 0.5], "expected weights that are numbers"),
        (
            {"a": llama(), "b": llama(tokens=2000)},
            None,
            "b and a have different vocabularies .2000 and 37 tokens.: .*bytes",
        ),
    ],
)
def test_members_in_memory_that_cannot_be_combined_are_refused(members, weights, words):
    with pytest.raises(GraftError, match=words):
        ensemble_of(members, weights)


def test_models_of_folders_with_other_tokens_are_refused_in_memory_too(family):  # noqa: F811
    path = family / "gpt2" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    loaded = {name: graft.load(family / name) for name in ("llama", "gpt2")}
    assert ensemble_of(loaded).config.vocab_size == TOKENS
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CannotCombine, match="gpt2 and llama have different vocabularies"):
        ensemble_of(loaded)


def reads_images():
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **ENDS}
    text |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": TOKENS, "max_position_embeddings": 64}
    seen = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config={**seen, "image_size": 28, "patch_size": 14}, **marks)
    return sharp(Gemma3ForConditionalGeneration(config), 8)


@torch.no_grad()
def test_a_model_that_reads_images_too_is_a_member_for_its_text(tmp_path):
    members = {"sees": reads_images(), "llama": llama()}
    ensemble, (ids, mask) = ensemble_of(members), prompts()
    expected = sum(each(ids[2:]).logits.softmax(-1) / 2 for each in members.values())
    torch.testing.assert_close(ensemble(ids[2:]).logits.exp(), expected)
    asked = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = ensemble.generate(ids, use_cache=False, **asked)
    assert torch.equal(ensemble.generate(ids, **asked), plain)
    assert (ensemble.limits, ensemble.config.num_hidden_layers) == ([64, 64], 4)
    for name, member in members.items():
        member.save_pretrained(tmp_path / "family" / "models" / name)
        letters().save_pretrained(tmp_path / "family" / "models" / name)
    lines = "".join(json.dumps({"text": f"text {chr(97 + i)} of some kind"}) + "\n" for i in range(20))
    (tmp_path / "text.jsonl").write_text(lines)
    text = {"source": "jsonl", "path": str(tmp_path / "text.jsonl"), "splits": {"dev": 0.5}}
    fit = {"members": list(members), "weights": {"fit": "text.dev"}}
    target, found = run(tmp_path / "family" / "models", fit, {"text": text})
    assert found["loss"] <= min(found["member_losses"].values()) + 1e-6
    assert models.load(target).config.vocab_size == TOKENS


def test_a_damaged_configuration_names_its_file(saved):
    with pytest.raises(CheckpointError, match=r"saved.config\.json: expected an ensemble's members"):
        graft.load(edited(saved, members=None))


def test_a_disk_that_is_full_is_told_and_leaves_no_ensemble(saved, tmp_path, monkeypatch):
    def full(source, target, **_):
        raise OSError(errno.ENOSPC, "No space left on device", target)

    ensemble = graft.load(saved)
    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, full, False, False))
    with pytest.raises(DiskError, match=r"other.members.llama: the disk is full; free some space"):
        ensemble.save_pretrained(tmp_path / "other", self_contained=True)
    assert not (tmp_path / "other" / "config.json").exists()


def test_a_member_that_cuts_text_otherwise_than_when_the_ensemble_was_made_is_named(family):  # noqa: F811
    target, _ = run(family, {"members": ["llama", "gpt2"], "vocabulary": "bytes"})
    assert graft.load(target).config.vocabulary == "bytes"
    path = family / "gpt2" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="the tokenizer of member 'gpt2' has changed since"):
        graft.load(target)
