"""Hashes of weights: what they are by brute force, the same in every order of writing, and those of older manifests."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft import hashing, lineage
from graft.checkpoint import TensorWriter
from graft.errors import CheckpointError
from graft.verbs import verb


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 bytes and two at a time, so that small tensors have several, and one that is not full."""
    monkeypatch.setattr(hashing, "BLOCK", 64)
    monkeypatch.setattr(hashing, "RUN", 2)
    monkeypatch.setattr(hashing._OWN, "buffer", memoryview(bytearray(64)), raising=False)


@pytest.fixture
def tensors():
    draw = np.random.default_rng(0)
    shapes = {"b": (7, 9), "a": (16,), "c": (3, 5, 11), "empty": (0, 4), "one": ()}
    return {name: np.asarray(draw.normal(size=shape), np.float32) for name, shape in shapes.items()}


def by_hand(tensors, block):
    whole = b""
    for name in sorted(tensors):
        raw = tensors[name].tobytes()
        digests = [xxhash.xxh3_128(raw[at : at + block]).digest() for at in range(0, len(raw), block)]
        head = json.dumps([name, "F32", list(tensors[name].shape)]).encode()
        whole += xxhash.xxh3_128(head + b"".join(digests)).digest()
    return "xxh3:" + xxhash.xxh3_128(whole).hexdigest()


def by_hand_in_older_manifests(tensors):
    whole = b""
    for name in sorted(tensors):
        head = json.dumps([name, "F32", list(tensors[name].shape)]).encode()
        whole += hashlib.sha256(head + tensors[name].tobytes()).digest()
    return hashlib.sha256(whole).hexdigest()


def test_the_hash_is_that_of_blocks_by_hand(tmp_path, tensors, small_blocks):
    save_file(tensors, tmp_path / "model.safetensors")
    assert hashing.hash_weights(tmp_path) == by_hand(tensors, 64)
    assert hashing.hash_weights(tmp_path, "sha256") == by_hand_in_older_manifests(tensors)


@pytest.mark.parametrize("piece", [4, 36, 64, 100, 192, 10_000])
@pytest.mark.parametrize("left_out", [0, 5])
def test_pieces_of_any_size_in_any_order_give_the_hash_of_the_file(tmp_path, tensors, small_blocks, piece, left_out):
    writer = TensorWriter(tmp_path, {name: ("F32", value.shape) for name, value in tensors.items()})
    raw = {name: value.tobytes() for name, value in tensors.items()}
    pieces = [(name, at) for name, one in raw.items() for at in range(0, len(one), piece)]
    random.Random(piece).shuffle(pieces)
    digests = hashing.Digests(writer)
    for place, (name, at) in enumerate(pieces):
        # what an earlier run wrote was not seen
        (writer if place < left_out else digests).write(name, at, raw[name][at : at + piece])
    writer.close()
    digests.finish()
    assert hashing.hash_weights(tmp_path) == by_hand(tensors, 64)
    hashing._WRITTEN.clear()
    assert hashing.hash_weights(tmp_path) == by_hand(tensors, 64)


def test_every_byte_counts_and_so_do_names_and_shapes(tmp_path, tensors, small_blocks):
    def found(changed):
        save_file(changed, tmp_path / "model.safetensors")
        return hashing.hash_weights(tmp_path)

    seen = {found(tensors)}
    for name, value in tensors.items():
        if value.size:
            other = np.atleast_1d(value.copy())
            other.view(np.uint8).reshape(-1)[-1] ^= 1
            other = other.reshape(value.shape)
            seen.add(found({**tensors, name: other}))
    seen.add(found({**tensors, "a": tensors["a"].reshape(4, 4)}))
    seen.add(found({("z" if name == "a" else name): value for name, value in tensors.items()}))
    assert len(seen) == 7


def model(folder, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(folder)
    return folder


def as_of_old(folder, parents=()):
    """The manifest as an older graft wrote it: all hashes are sha256."""
    manifest = lineage.read_manifest(folder)
    told = [p.model_copy(update={"hash": lineage.hash_model(parents[p.name], "sha256")}) for p in manifest.parents]
    old = {"hash": lineage.hash_model(folder, "sha256"), "parents": told, "key": ""}
    lineage.write_manifest(folder, manifest.model_copy(update=old))


def test_a_model_with_an_older_manifest_is_what_it_was_and_damage_is_found(tmp_path):
    parents = [model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    merged = graft.merge(tmp_path / "m", models=parents, anyway=True)
    as_of_old(merged, {str(folder): folder for folder in parents})
    manifest = lineage.read_manifest(merged)
    assert len(manifest.hash) == 64
    assert lineage.hash_model(merged) == lineage.known_hash(merged) == manifest.hash
    assert lineage.known_hash(merged, "xxh3:").startswith("xxh3:")
    file = merged / "model.safetensors"
    file.touch()
    lineage.check_as_made(merged)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"its weights are not those that graft\.json tells of"):
        lineage.check_as_made(merged)


def test_what_an_older_graft_made_of_foreign_models_stands(tmp_path, monkeypatch):
    parents = [model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    asked = {"models": [str(folder) for folder in parents], "anyway": True}
    with monkeypatch.context() as older:
        older.setattr(hashing.hash_weights, "__defaults__", ("sha256",))
        older.setattr(lineage, "way_of", lambda told: "sha256")
        older.setattr(lineage, "_way", lambda folder, like: "sha256")
        made = graft.merge(tmp_path / "m", **asked)
    before = (made / "graft.json").read_text()
    assert "xxh3" not in json.loads(before)["parents"][0]["hash"]
    assert graft.merge(tmp_path / "m", **asked) == made
    assert (made / "graft.json").read_text() == before


def test_the_key_of_a_copy_is_that_of_an_older_graft_so_that_what_was_trained_on_it_stands(tmp_path):
    foreign = model(tmp_path / "foreign")
    settings = verb("load").parse({"path": str(foreign)})
    assert verb("load").content(settings)["weights"] == lineage.hash_model(foreign, "sha256")
