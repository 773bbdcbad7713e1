"""What people read after a merge: what was wrong, what was found, and whose configuration it has."""

from __future__ import annotations

import json

import pytest
from small_family import model, save
from typer.testing import CliRunner

from graft import verbs
from graft.cli import app
from graft.lineage import read_manifest, write_manifest
from graft.merge.telling import lines
from graft.one import told


def invoke(*words):
    done = CliRunner().invoke(app, ["merge", *(str(word) for word in words)])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()[1:]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Two models of one start, the second with another rotary base and more positions."""
    root = tmp_path_factory.mktemp("apart")
    first = model(0)
    second = model(
        1, near=first, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    return {"a": save(first, root / "a"), "b": save(second, root / "b")}


def test_differing_configurations_and_the_parent_of_the_files_are_told(apart, tmp_path):
    read = invoke(tmp_path / "out", apart["a"], apart["b"])
    (differing,) = [line for line in read if "differ in" in line]
    assert differing.startswith(f"{apart['a']} and {apart['b']} differ in ")
    assert "max_position_embeddings 32 and 64" in differing
    assert "500000.0" in differing
    assert differing.endswith(f"the merge has what {apart['a']} has")
    assert read[-1] == f"configuration, tokenizer and generation settings of {apart['a']}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 32
    (correlated,) = [line for line in read if line.startswith("correlation of the weights")]
    assert float(correlated.rpartition(" ")[2]) > 0.5


def test_what_was_overridden_comes_first(apart, tmp_path):
    invoke(tmp_path / "out", apart["a"], apart["b"])
    manifest = read_manifest(tmp_path / "out")
    write_manifest(tmp_path / "out", manifest.model_copy(update={"forced": ["a and b are strangers"]}))
    assert told(tmp_path / "out")[0] == "merged anyway: a and b are strangers"
    assert told(tmp_path / "out")[1:] == verbs.told(manifest)


def test_a_merge_of_like_models_tells_of_nothing_wrong(apart, tmp_path):
    like = save(model(3, near=model(0)), tmp_path / "like")
    read = invoke(tmp_path / "out", apart["a"], like)
    assert not [line for line in read if "differ" in line or "forced" in line]


def test_a_tokenizer_that_is_not_there_and_one_that_is_made_are_told():
    notes = {"config_from": "a", "files_taken": ["generation_config.json"]}
    assert lines(notes) == ["configuration and generation settings of a", "no tokenizer: a has none beside its weights"]
    joined = {"how": "union", "rows": 52, "new_tokens": 4, "lacking": {"a": 4, "b": 0}}
    assert lines({**notes, "files_taken": ["tokenizer_config.json"], "vocabulary": joined}) == [
        "vocabulary of 52 rows (union), 4 of them new: a lacked 4, b lacked 0",
        "configuration of a",
    ]
    with_template = {"config_from": "a", "files_taken": ["tokenizer.json", "chat_template.jinja"]}
    assert lines(with_template) == ["configuration, tokenizer and chat template of a"]


def test_what_an_adapter_has_kept_is_told(apart, tmp_path):
    like = save(model(3, near=model(0)), tmp_path / "like")
    read = invoke(tmp_path / "out", like, "--method", "extract_lora", "--base", apart["a"], "--rank", "2")
    found = read_manifest(tmp_path / "out").notes
    (adapter,) = [line for line in read if line.startswith("an adapter of rank 2 for 14 layers, relative error ")]
    assert f"{max(found['relative_error'].values()):.2%} at most" in adapter
    kept, out = read[read.index(adapter) + 1].split(" kept; ")
    assert kept == f"  {found['share_kept']:.2%} of the squared difference from {apart['a']}"
    assert out == "left out: 7 tensors that changed too"
    assert lines({"exact": True, "ranks": {"x": 2, "y": 3}}) == ["an adapter of ranks 2 to 3 for 2 layers"]


def test_barriers_and_alignment_are_told():
    measured = {"metric": "bits_per_byte", "barrier_before": 1.25, "barrier_after": None}
    alignment = {"to": "a", "models": {"b": {"cosine_before": 0.25, "cosine_after": 0.75, **measured}}}
    assert lines({"alignment": alignment}) == [
        "b was put into the order of a: cosine 0.250 before, 0.750 after",
        "  barrier on the straight line between them: 1.2500 before, no number on the way after (bits_per_byte)",
    ]
    barriers = {"metric": "bits_per_byte", "on": ["d"], "lines": [{"between": ["a", "b"], "barrier": 0.5}]}
    assert lines({"barriers": barriers}) == ["barrier on the straight line between a and b: 0.5000 (bits_per_byte)"]
