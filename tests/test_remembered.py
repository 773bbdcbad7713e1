"""What is kept for all runs of a user: hashes of weights that nobody vouches for, and never more than is still true."""

import os

import pytest
import torch
from safetensors.torch import save_file

import graft
from graft import hashing, lineage, machine, remembered


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    write(made, 1.0)
    return made


def write(folder, value, age_s=60):
    file = folder / "model.safetensors"
    save_file({"a": torch.full((4,), value), "b": torch.zeros(2, 3)}, file)
    at = file.stat().st_mtime - age_s
    os.utime(file, (at, at))


def settled(monkeypatch):
    """As if the files had stood there for a while: the time of their last change cannot be set."""
    monkeypatch.setattr(hashing, "SETTLED_NS", -(10**9))
    hashing._hash_once.cache_clear()


def counted(monkeypatch):
    """The folders whose weights are read."""
    read = []
    hash_files = hashing._hash_files
    monkeypatch.setattr(hashing, "_hash_files", lambda place, way: read.append(place) or hash_files(place, way))
    return read


def test_another_process_need_not_read_what_has_not_changed(home, folder, monkeypatch):
    settled(monkeypatch)
    read = counted(monkeypatch)
    first = hashing.hash_weights(folder)
    hashing._hash_once.cache_clear()
    assert hashing.hash_weights(folder) == first
    assert len(read) == 1


def test_what_was_changed_is_read_again(home, folder, monkeypatch):
    settled(monkeypatch)
    first = hashing.hash_weights(folder)
    write(folder, 2.0)
    assert hashing.hash_weights(folder) != first


def test_a_machine_that_has_started_anew_reads_again(home, folder, monkeypatch, tmp_path):
    settled(monkeypatch)
    read = counted(monkeypatch)
    hashing.hash_weights(folder)
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(machine, "BOOT", tmp_path / "boot")
    hashing._hash_once.cache_clear()
    hashing.hash_weights(folder)
    assert len(read) == 2


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"no newline", b"[]\n"])
def test_a_damaged_note_is_no_note(home, folder, monkeypatch, damage):
    settled(monkeypatch)
    first = hashing.hash_weights(folder)
    (note,) = (home / "hashes").iterdir()
    note.write_bytes(damage)
    hashing._hash_once.cache_clear()
    assert hashing.hash_weights(folder) == first


def test_nothing_is_kept_where_that_is_not_wanted_or_not_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", "")
    assert remembered.home() is None
    remembered.keep("kind", "about", "found")
    assert remembered.recall("kind", "about") is None
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file"))
    remembered.keep("kind", "about", "found")
    assert remembered.recall("kind", "about") is None


def test_it_stands_where_the_system_wants_it(tmp_path, monkeypatch):
    monkeypatch.delenv("GRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered.home() == tmp_path / "graft"
    remembered.keep("kind", "about", "found")
    assert remembered.recall("kind", "about") == "found"


def test_a_merge_that_the_disk_may_not_have_is_hashed_after_the_machine_starts_anew(tmp_path, monkeypatch):
    from graft.plan.steps import damage

    for name in ("a", "b"):
        _model(tmp_path / name, seed=ord(name))
    merged = graft.merge(tmp_path / "m", models=[tmp_path / "a", tmp_path / "b"], anyway=True)
    manifest = lineage.read_manifest(merged)
    if manifest.boot is None:
        pytest.skip("this system does not tell when it was started")
    assert not lineage.touched(merged, manifest)
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(machine, "BOOT", tmp_path / "boot")
    assert lineage.touched(merged, manifest)
    assert not damage(merged, verify=False)
    # a page of the file that was never written
    file = merged / "model.safetensors"
    stamp = file.stat()
    whole = bytearray(file.read_bytes())
    whole[-64:] = bytes(64)
    file.write_bytes(whole)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert "not those it was made with" in damage(merged, verify=False)


def _model(folder, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(folder)


def test_the_hash_of_a_merge_is_taken_while_it_is_made(tmp_path, monkeypatch):
    for name in ("a", "b"):
        _model(tmp_path / name, seed=ord(name))
    read = counted(monkeypatch)
    merged = graft.merge(tmp_path / "m", models=[tmp_path / "a", tmp_path / "b"], anyway=True)
    assert {place.name for place in read} == {"a", "b"}
    hashing._WRITTEN.clear()
    assert lineage.read_manifest(merged).hash == hashing.hash_weights(merged)
