"""Hashes follow content alone; manifests are strict; a folder's facts come from it."""

import json
import os
import re
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft import hashing, lineage, models
from graft.errors import CheckpointError, RequestError
from graft.facts import facts_of
from graft.folders import architecture_of
from graft.lineage import Manifest, Parent
from graft.vocabulary import vocabulary_hash


def tiny(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def manifest(**more):
    plain = {
        "name": "m", "verb": "tune", "verb_version": 1, "key": "k", "hash": "h", "initialisation": "i",
        "vocabulary": "v", "architecture": "decoder", "parameters": 3,
    }  # fmt: skip
    return Manifest(**{**plain, **more})


def test_the_hash_of_weights_does_not_depend_on_the_shards(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert hashing.hash_weights(tmp_path / "one") == hashing.hash_weights(tmp_path / "many")


def test_one_changed_value_changes_the_hash(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    model.save_pretrained(tmp_path / "b")
    assert hashing.hash_weights(tmp_path / "a") != hashing.hash_weights(tmp_path / "b")


def test_a_hash_is_remembered_until_a_file_changes_even_to_one_of_the_same_size(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "SETTLED_NS", -(10**9))
    read = []
    monkeypatch.setattr(hashing, "_block", lambda reader, name, start: read.append(name) or name.encode())
    tiny().save_pretrained(tmp_path)
    first = hashing.hash_weights(tmp_path)
    once = len(read)
    assert hashing.hash_weights(tmp_path) == first
    assert len(read) == once > 0
    (tmp_path / "model.safetensors").touch()
    hashing.hash_weights(tmp_path)
    assert len(read) == 2 * once


def test_a_file_that_has_just_been_written_is_read_again(tmp_path):
    tiny().save_pretrained(tmp_path)
    before = hashing.hash_weights(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    assert hashing.hash_weights(tmp_path) != before


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    written = manifest(parents=[Parent(name="p", path="../p", hash="x")], metrics={"loss": 1.5}, notes={"ü": [1]})
    lineage.write_manifest(tmp_path, written)
    assert lineage.read_manifest(tmp_path) == written
    assert lineage.read_manifest(tmp_path / "none") is None


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "graft.json").write_text('{"name": ')
    with pytest.raises(CheckpointError, match=r"graft.json: the manifest is damaged"):
        lineage.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"seed": "x"}, "seed: expected a whole number, found 'x'"),
        ({"key": 3, "hash": None}, "key: expected text, found 3, and 1 more"),
        ({"files": {"a": ["b", 0]}}, "files.a.0: expected a whole number, found 'b'"),
        (None, "Invalid JSON: EOF while parsing .*"),
        ([], "expected a mapping with format, name, .*, found \\[\\]"),
    ],
)
def test_of_a_damaged_manifest_the_field_is_named_in_one_line(tmp_path, content, why):
    text = json.dumps({**manifest().plain(), **content} if isinstance(content, dict) else content)
    (tmp_path / "graft.json").write_text('{"name": ' if content is None else text)
    with pytest.raises(CheckpointError) as error:
        lineage.read_manifest(tmp_path)
    assert re.fullmatch(f".*graft.json: the manifest is damaged \\({why}\\); remove the file .*", str(error.value))


def test_facts_without_a_manifest_come_from_configuration_and_headers(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    assert facts.architecture == "decoder"
    assert facts.parameters == model.num_parameters()
    assert facts.bytes == 4 * model.num_parameters()
    assert facts.initialisation.startswith("unknown:")


def test_a_copy_of_a_folder_has_the_same_facts_and_another_model_does_not(tmp_path):
    tiny(0).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tiny(1).save_pretrained(tmp_path / "c")
    a, b, c = (facts_of(tmp_path / name).initialisation for name in "abc")
    assert a == b != c


def test_facts_with_a_manifest_are_the_manifests(tmp_path):
    tiny().save_pretrained(tmp_path)
    lineage.write_manifest(tmp_path, manifest(initialisation="of:base", trained_on=["x"]))
    facts = facts_of(tmp_path)
    assert facts.initialisation == "of:base"
    assert facts.trained_on == {"x"}


def made(folder, seed=0):
    """A model's folder as graft makes it."""
    tiny(seed).save_pretrained(folder)
    files, found = lineage.stamps(folder), lineage.hash_model(folder)
    lineage.write_manifest(folder, manifest(hash=found, files=files))
    return folder


def test_weights_that_were_changed_after_the_model_was_made_are_named_however_old_the_files_are(tmp_path):
    folder = made(tmp_path / "a")
    other = made(tmp_path / "b", seed=1) / "model.safetensors"
    os.utime(other, (1, 1))
    shutil.copy2(other, folder / "model.safetensors")
    for read in (models.load, facts_of):
        with pytest.raises(CheckpointError, match=r"a: its weights are not those that graft.json tells of"):
            read(folder)
    assert lineage.known_hash(folder) == lineage.known_hash(tmp_path / "b")
    (folder / "graft.json").unlink()
    assert models.load(folder).num_parameters() == tiny().num_parameters()


def test_a_copy_is_hashed_once_and_what_was_not_touched_never(tmp_path, monkeypatch):
    folder, hashed = made(tmp_path / "a"), []
    real = lineage.hash_model
    monkeypatch.setattr(lineage, "hash_model", lambda place, like=None: hashed.append(place) or real(place, like))
    models.load(folder)
    facts_of(folder)
    assert hashed == []
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
    models.load(tmp_path / "copy")
    facts_of(tmp_path / "copy")
    assert hashed == [tmp_path / "copy"]
    assert lineage.read_manifest(tmp_path / "copy").hash == lineage.read_manifest(folder).hash


def test_a_manifest_without_stamps_is_older_than_what_was_changed_after_it(tmp_path):
    folder = made(tmp_path / "a")
    old = lineage.read_manifest(folder).model_copy(update={"files": {}, "hash": "h"})
    lineage.write_manifest(folder, old)
    lineage.check_as_made(folder)
    future = (folder / "graft.json").stat().st_mtime_ns + 10**9
    os.utime(folder / "model.safetensors", ns=(future, future))
    with pytest.raises(CheckpointError, match=r"make it anew, or remove graft\.json"):
        lineage.check_as_made(folder)


def test_a_folder_that_is_no_models_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"expected a model's folder with config.json"):
        facts_of(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "encoder"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_architectures_are_told_from_configurations(config, expected):
    assert architecture_of(config) == expected


def test_vocabularies_are_the_same_by_their_strings_and_numbers(tmp_path):
    for name, tokens in (("a", {"x": 0, "y": 1}), ("b", {"y": 1, "x": 0}), ("c", {"x": 1, "y": 0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    a, b, c = (vocabulary_hash(tmp_path / name) for name in "abc")
    assert a == b != c


def test_vocabularies_that_are_plain_lists_are_compared_too(tmp_path):
    """As older tokenizers are saved: by id, or in their order, with added tokens beside."""
    files = {
        "whole": ("tokenizer.json", json.dumps({"model": {"vocab": {"x": 0, "y\u2028": 1}}, "added_tokens": []})),
        "ids": ("vocab.json", json.dumps({"y\u2028": 1, "x": 0})),
        "order": ("vocab.txt", "x\ny\u2028\n"),
        "other": ("vocab.txt", "y\u2028\nx\n"),
        "nested": ("vocab.json", json.dumps({"en": {"x": 0}})),
    }
    for name, (file, text) in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    found = {name: vocabulary_hash(tmp_path / name) for name in files}
    assert found["whole"] == found["ids"] == found["order"] != found["other"]
    assert found["nested"].startswith("none:")
    (tmp_path / "order" / "added_tokens.json").write_text(json.dumps({"z": 2}))
    assert vocabulary_hash(tmp_path / "order") not in found.values()


def test_versions_and_code_are_recorded():
    assert {"graft", "torch", "transformers", "python"} <= set(lineage.versions())
    assert set(lineage.code_state()) == {"commit", "dirty"}


def test_models_are_found_by_their_manifests(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
        lineage.write_manifest(tmp_path / "models" / name, manifest(name=name))
    assert set(lineage.find_models(tmp_path)) == {"a", "b"}
    assert set(lineage.find_models(tmp_path / "models" / "a")) == {"a"}


def test_a_truncated_model_does_not_load(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        models.load(tmp_path)
