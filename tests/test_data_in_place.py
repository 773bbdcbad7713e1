"""Settings of a data set in the place of its name, on the command line and from Python."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.errors import DataError, SettingsError
from graft.one import data_named, in_place
from graft.pretrain.architectures import Shape, build, config_for


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": f"note {n}"}) + "\n" for n in range(200)))
    (tmp_path / "held.txt").write_text("held out\n")
    return tmp_path


def invoke(*words):
    return CliRunner().invoke(app, list(words))


def test_settings_in_place_are_named_by_what_they_say_where_data_sets_are_named_and_nowhere_else():
    named = '{"path": "a.jsonl", "limit": 3}'
    said = {"path": "a.jsonl", "limit": 3}
    assert in_place({"data": said}) == {"data": named}
    assert in_place({"data": {"train": "a", "dev": "b"}}) == {"data": '{"train": "a", "dev": "b"}'}
    assert in_place({"data": {**said, "split": "dev"}}) == {"data": f"{named}.dev"}
    assert in_place({"tasks": {"one": {"data": said, "head": {}}}}) == {"tasks": {"one": {"data": named, "head": {}}}}
    assert in_place({"weights": {"fit": said}}) == {"weights": {"fit": named}}
    assert in_place({"on": ["{path: a.jsonl, limit: 3}", "b.test"]}) == {"on": [named, "b.test"]}
    assert in_place({"data": {"models/a": said, "b": "x"}}) == {"data": {"models/a": named, "b": "x"}}
    assert in_place({"method": said}) == {"method": said}
    assert in_place(f"{named}.dev", within=True) == f"{named}.dev"


def test_paths_are_seen_from_here_and_tell_the_source(at):
    place = str(at / "notes.jsonl")
    refs = [
        '{"path": "notes.jsonl", "limit": 3}',
        '{"train": "notes.jsonl", "dev": ["held.jsonl"]}',
        '{"mix": {"a": 1}}',
    ]
    found = data_named(refs, {})
    whole = {"dev": 0, "test": 0}
    assert found[refs[0]] == {"source": "jsonl", "path": place, "limit": 3, "splits": whole}
    assert found[refs[1]] == {"source": "jsonl", "train": [place], "dev": [str(at / "held.jsonl")]}
    assert found[refs[2]] == {"mix": {"a": 1}}
    split = '{"path": "notes.jsonl", "splits": {"dev": 0.5}}'
    assert data_named([split], {})[split]["splits"] == {"dev": 0.5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{path: notes.jsonl", "expected a data set's settings, such as {path: a.jsonl, limit: 10}, found {path"),
        ("{path: notes.jsonl, path: x}", "this key stands twice"),
        ("{path: notes.jsonl, split: tst}", "expected a `split` of train, dev, test, found 'tst'"),
        ("{train: [notes.jsonl, held.txt]}", "notes.jsonl, held.txt: expected files of one known kind, or `source`"),
        ("{path: nowhere}", "nowhere: expected files of one known kind, or `source`"),
    ],
)
def test_what_cannot_be_read_is_said(text, expected, at):
    with pytest.raises(DataError, match=expected):
        data_named([in_place(text, within=True)], {})


def test_a_model_is_trained_and_measured_on_settings_in_place(at):
    told = "{path: notes.jsonl, splits: {dev: 0.2, test: 0.2}, limit: 150}"
    made = invoke(
        "pretrain", "base", "--data", told, "--size", "40k", "--length", "32", "--budget", "2 steps",
        "--set", "tokenizer.size=300", "--device", "cpu",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    ((use,),) = [json.loads((at / "base" / "graft.json").read_text())["data"]]
    assert json.loads(use["name"]) == {"path": "notes.jsonl", "splits": {"dev": 0.2, "test": 0.2}, "limit": 150}
    counts = {}
    test = f"{told[:-1]}, split: test}}"
    for on in ("{path: notes.jsonl, limit: 20}", "{path: notes.jsonl}", test):
        result = invoke("eval", "base", "--on", on, "--json")
        assert result.exit_code == 0, result.output
        counts[on] = json.loads(result.stdout)[-1]["n"]
    assert list(counts.values())[:2] == [20, 200]
    assert 0 < list(counts.values())[2] < 75
    (row,) = graft.evaluate(["base"], [{"measure": "bits_per_byte", "on": [{"path": "notes.jsonl", "limit": 20}]}])
    assert row["n"] == 20


def test_a_wrong_key_inside_is_told(at):
    ids = {"pad": 0, "bos": 1, "eos": 2}
    build(config_for("decoder", "rotary", Shape(16, 1, 2, 40, 16, 0.0, ids))).save_pretrained(at / "model")
    with pytest.raises(SettingsError, match=r"limt: unknown key \(did you mean 'limit'\?\)"):
        graft.tune("out", from_="model", data={"path": "notes.jsonl", "limt": 3})
    assert not (at / "out").exists()


@pytest.mark.parametrize("name", ["pretrain", "tune", "advise", "eval", "gains", "deltas", "ensemble"])
def test_the_help_of_commands_that_name_data_shows_settings_in_place(name):
    shown = " ".join(invoke(name, "--help").stdout.replace("│", " ").split())
    assert "'{path: " in shown or "'{train: " in shown


def test_a_file_that_is_not_there_is_shown_with_the_nearest_beside_it(at):
    with pytest.raises(DataError, match=r"found nothing at note.jsonl \(did you mean 'notes.jsonl'\?\)"):
        data_named(["note.jsonl"], {})
