"""Ids on the hub as parents: only where the network is allowed."""

import json

import huggingface_hub
import pytest
from small_family import family
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.errors import RequestError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that holds one model; what was asked of it."""
    folders = family(tmp_path / "models", 2)
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str(folders["b"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return folders, asked


def test_an_id_is_fetched_only_where_that_is_allowed(hub, tmp_path):
    folders, asked = hub
    mine = str(folders["a"])
    with pytest.raises(
        RequestError, match=r"found none at org/model; a model on the hub needs the network .*`hub=True` \(--hub\)"
    ):
        graft.merge(tmp_path / "no", models=["org/model", mine])
    assert asked == []
    out = graft.merge(tmp_path / "out", models=["org/model", mine], hub=True)
    assert asked[0][0] == "org/model"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked[0][1])
    assert [parent["name"] for parent in json.loads((out / "graft.json").read_text())["parents"]] == ["org/model", mine]


def test_the_command_has_the_same_flags(hub, tmp_path):
    folders, asked = hub
    words = [
        "merge",
        str(tmp_path / "out"),
        "org/model",
        str(folders["a"]),
        "--hub",
        "--allow-pickle",
        "--normalise",
        "false",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert asked
    settings = json.loads((tmp_path / "out" / "graft.json").read_text())["settings"]
    assert (settings["allow_pickle"], settings["normalise"]) == (True, False)
