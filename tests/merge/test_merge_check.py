"""The architecture of an output is built once for a configuration, here or in another process, with the same answer."""

import json
import sys
from dataclasses import asdict

import pytest
from small_family import family, merge, model

from graft.errors import CheckpointError
from graft.merge import architecture
from graft.merge.architecture import Check, verify


@pytest.fixture
def folder(tmp_path):
    """One whose architecture has to be built: nobody knows what `flavour` means."""
    model(0).config.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(
        (tmp_path / "m" / "config.json")
        .read_text()
        .replace("{", '{"architectures": ["LlamaForCausalLM"], "flavour": "plain",', 1)
    )
    return tmp_path / "m"


def checked(folder, cache):
    cache.mkdir(exist_ok=True)
    check = Check(folder, cache)
    try:
        return check.found()
    finally:
        check.close()


def test_another_process_finds_what_this_one_finds(folder, tmp_path, monkeypatch):
    here = checked(folder, tmp_path / "here")
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "transformers"})
    assert checked(folder, tmp_path / "there") == here
    assert here.shapes == {name: tuple(value.shape) for name, value in model(0).state_dict().items()}


def test_it_is_built_once_for_a_configuration(folder, tmp_path, monkeypatch):
    first = checked(folder, tmp_path / "cache")
    monkeypatch.setattr(architecture, "built", lambda *_: None)
    assert checked(folder, tmp_path / "cache") == first
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))
    assert checked(folder, tmp_path / "cache") is None


def test_a_configuration_that_builds_nothing_is_said(folder, tmp_path):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": "wide"'))
    with pytest.raises(CheckpointError, match="the configuration does not build a model"):
        checked(folder, tmp_path / "cache")


def test_what_does_not_fit_is_named(folder, tmp_path):
    made = checked(folder, tmp_path / "cache")
    shapes = dict(made.shapes)
    assert verify(made, shapes) == "LlamaForCausalLM"
    shapes["model.norm.weight"] = (17,)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError) as error:
        verify(made, shapes)
    assert str(error.value) == (
        "the output would not fit LlamaForCausalLM: missing 1: model.layers.1.mlp.up_proj.weight; "
        "model.norm.weight is [17], expected [16]"
    )


class Told(list):
    """Stands for the process: notes what it was asked to build, and answers at once."""

    def __call__(self, config):
        self.append(config)
        return self

    def answer(self):
        shapes = {"hidden": (json.loads(self[-1])["hidden_size"],)}
        return 0, json.dumps(asdict(architecture.Architecture("Told", shapes, {}, "", False)))

    def close(self):
        pass


def test_it_is_begun_before_the_output_is_there(folder, tmp_path, monkeypatch):
    """The first who names a configuration starts the process, the type of the weights aside; later ones share it."""
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "transformers"})
    monkeypatch.setattr(architecture, "Building", begun := Told())
    architecture.started.cache_clear()
    architecture.begin(folder, tmp_path / "one")
    assert len(begun) == 1
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size"', '"dtype": "bfloat16", "hidden_size"'))
    assert checked(folder, tmp_path / "one").shapes == {"hidden": (16,)}
    assert checked(folder, tmp_path / "other").shapes == {"hidden": (16,)}
    assert len(begun) == 1
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))
    assert checked(folder, tmp_path / "one").shapes == {"hidden": (32,)}
    assert len(begun) == 2
    architecture.started.cache_clear()
    architecture.begin(folder, tmp_path / "one")
    assert len(begun) == 2, "what is known from an earlier merge is not built again"
    architecture.begin(folder, tmp_path / "two")
    assert len(begun) == 3
    architecture.started.cache_clear()


def test_what_the_other_process_cannot_build_is_tried_here(folder, tmp_path, monkeypatch):
    """It does without packages that may be needed after all."""
    here = checked(folder, tmp_path / "here")
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "transformers"})
    monkeypatch.setattr(Told, "answer", lambda self: (1, ""))
    monkeypatch.setattr(architecture, "Building", Told())
    architecture.started.cache_clear()
    assert checked(folder, tmp_path / "there") == here
    architecture.started.cache_clear()


def test_what_does_not_fit_ends_a_merge_that_has_begun(tmp_path, monkeypatch):
    import threading

    import graft.merge.engine as engine

    folders = family(tmp_path / "family", 2)
    told = threading.Event()

    def misfit(made, shapes):
        told.set()
        raise CheckpointError("the output would not fit Something")

    note = engine.Journal.note

    def noted(journal, name, size):
        assert told.wait(60)
        note(journal, name, size)

    monkeypatch.setattr(engine, "verify", misfit)
    monkeypatch.setattr(engine.Journal, "note", noted)
    with pytest.raises(CheckpointError, match="would not fit Something"):
        merge({"method": "linear", "models": ["a", "b"]}, folders, tmp_path / "out")
    assert not (tmp_path / "out" / "graft.json").exists()
