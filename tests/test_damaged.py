"""Models with damaged files: every command that takes models says so before any work, in the same words."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.data.tokenizers import train_tokenizer
from graft.errors import RequestError
from graft.models import check_asked
from graft.pretrain.architectures import Shape, build, config_for

REQUESTS = {
    "relate": ["sick", "well"],
    "deltas": ["well", "sick"],
    "eval": ["sick", "well", "--on", "text.txt", "--out", "out"],
    "gains": ["well", "sick", "--on", "text.txt"],
    "show": ["sick", "--text", "x"],
    "chat": ["sick", "-p", "x"],
    "advise": ["sick", "--data", "text.txt"],
    "merge": ["out", "sick", "well"],
    "merge --explain": ["out", "sick", "well", "--explain"],
    "ensemble": ["out", "sick", "well"],
    "quantize": ["out", "sick"],
    "adapt": ["out", "sick"],
}
"""A request of each command for a model that is damaged."""


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"model.safetensors: tensor .* ends at byte .*: truncated; get the file anew"


def half_a_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:40])
    return r"config.json: the configuration is damaged"


def half_a_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:40])
    return r"tokenizer.json: expected a tokenizer, found a damaged file"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return r"expected model.safetensors or model.safetensors.index.json, found neither"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model, and a text."""
    home = tmp_path_factory.mktemp("damaged")
    (home / "text.txt").write_text("a line of words\n" * 50)
    raw = {"source": "text", "path": str(home / "text.txt"), "splits": {"dev": 0, "test": 0}}
    sets = {"d": graft.data.parse(raw)}
    tokenizer = train_tokenizer(graft.data.open_corpus(sets, "d", home), "bpe", 270)
    ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    shape = Shape(16, 1, 2, len(tokenizer), 16, 0.0, ids)
    build(config_for("decoder", "rotary", shape)).save_pretrained(home / "well")
    tokenizer.save_pretrained(home / "well")
    return home


@pytest.fixture
def at(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(places, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "well", tmp_path / "sick")
    return tmp_path


@pytest.mark.parametrize("damage", [truncated, half_a_config, half_a_tokenizer, no_weights])
def test_a_damaged_model_is_a_wrong_request_of_every_command(damage, at):
    words = damage(at / "sick")
    for name, more in REQUESTS.items():
        result = CliRunner().invoke(app, [name.split()[0], *more, "--json"])
        told = json.loads(result.stdout)
        assert (name, result.exit_code, told["exit_code"]) == (name, 2, 2)
        assert re.search(words, told["error"])
        assert not (at / "out").exists(), name


@pytest.mark.parametrize(("harm", "words"), [(shutil.rmtree, "'sick' is missing"), (truncated, "truncated")])
def test_an_ensemble_without_its_member_is_a_wrong_request_too(harm, words, at):
    made = CliRunner().invoke(app, ["ensemble", "both", "--combine", "linear", "sick=0.5", "well=0.5", "--json"])
    assert made.exit_code == 0
    harm(at / "sick")
    result = CliRunner().invoke(app, ["eval", "both", "--on", "text.txt", "--out", "out", "--json"])
    assert result.exit_code == 2
    assert words in json.loads(result.stdout)["error"]


def test_all_damaged_models_are_told_at_once(at):
    truncated(at / "sick")
    shutil.copytree(at / "well", at / "ill")
    half_a_config(at / "ill")
    with pytest.raises(
        RequestError, match=r"sick/model.safetensors.*truncated.*\n.*ill/config.json: the configuration"
    ):
        check_asked([at / "sick", at / "well", at / "ill"])


def test_what_is_loaded_must_fit_its_configuration_and_its_manifest(at):
    path = at / "sick" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))
    check_asked([at / "sick"], loads=False)
    with pytest.raises(RequestError, match=r"the weights do not fit config\.json"):
        check_asked([at / "sick"])
