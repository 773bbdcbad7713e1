"""What the command of a merge makes of its words."""

import pytest
from small_family import family
from typer.testing import CliRunner

import graft
from graft._verb_command import requested
from graft.cli import app
from graft.errors import RequestError
from graft.lineage import read_manifest
from graft.merge import engine
from graft.run import NodesFailed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"), 2)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("words", [["a", "--models", "{a: -1}"], ["a=1", "b=2", "--models", "[a]"]])
def test_models_as_words_and_as_an_option_are_refused(words):
    with pytest.raises(RequestError, match=r"expected the models behind the folder or as --models, found both: a"):
        requested("merge", ["o", *words], [])
    with pytest.raises(RequestError, match="found both: x"):
        requested("merge", ["o", "x"], ["models.a=2"])
    assert requested("merge", ["o", "--models", "{a: -1}"], []) == ("o", {"models": {"a": -1}})


def test_a_folder_may_be_called_what_no_node_may(folders, tmp_path):
    out = tmp_path / "llama-3.1 merge"
    assert invoke("merge", out, folders["a"], folders["b"]).exit_code == 0
    assert read_manifest(out).name == "llama-3-1-merge"
    assert graft.load(out)
    assert "is there already" not in invoke("merge", out, folders["a"], folders["b"]).stderr


def test_a_file_is_no_folder_to_write(folders, tmp_path):
    (tmp_path / "x").write_text("kept")
    refused = invoke("merge", tmp_path / "x", folders["a"], folders["b"])
    assert refused.exit_code == 2
    assert "expected a folder to write, found the file" in refused.stderr
    assert (tmp_path / "x").read_text() == "kept"


def test_a_model_may_have_the_name_of_one_it_is_made_from(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["a"].parent)
    made = invoke("merge", tmp_path / "a", "a", "b")
    assert (made.exit_code, made.stderr) == (0, made.stderr)
    found = read_manifest(tmp_path / "a")
    assert (found.name, [parent.name for parent in found.parents]) == ("a-merge", ["a", "b"])
    again = invoke("merge", tmp_path / "a", "a", "b")
    assert (again.exit_code, read_manifest(tmp_path / "a").created) == (0, found.created)
    assert sorted(graft.tree(tmp_path / "a")) == ["a", "a-merge", "b"]


def test_a_model_never_takes_the_place_of_one_it_is_made_from(folders, monkeypatch):
    monkeypatch.chdir(folders["a"].parent)
    before = (folders["a"] / "model.safetensors").read_bytes()
    for target in ("a", "./a"):
        shown = invoke("merge", target, "a", "b", "--force")
        assert (shown.exit_code, "which it is to be made from: choose another folder" in shown.stderr) == (2, True)
    assert (folders["a"] / "model.safetensors").read_bytes() == before


def test_flags_of_the_command_may_be_said_as_settings_are(folders, tmp_path):
    words = ["merge", tmp_path / "o", folders["a"], folders["b"]]
    for flags in (["--force", "true"], ["--force=false", "--wait", "true"], ["--hub=true", "--no-wait", "false"]):
        made = invoke(*words, *flags)
        assert (made.exit_code, made.stderr) == (0, made.stderr)
        assert [parent.name for parent in read_manifest(tmp_path / "o").parents] == list(map(str, words[2:]))
    changed = [*words, "--dtype", "bfloat16"]
    assert invoke(*changed, "--force", "false").exit_code == 2
    assert invoke(*changed, "--force", "true").exit_code == 0
    assert read_manifest(tmp_path / "o").settings["dtype"] == "bfloat16"


def test_a_merge_that_failed_before_its_first_tensor_is_planned_as_to_be_made(folders, tmp_path, monkeypatch):
    recipe = tmp_path / "family.yaml"
    loads = "".join(f"  {name}: {{load: {folder}}}\n" for name, folder in folders.items())
    recipe.write_text(f"family: f\nmodels:\n{loads}  soup: {{merge: {{models: [a, b]}}}}\n")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "stream", fail)
    with pytest.raises(NodesFailed, match="the disk is full"):
        graft.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "work" / "soup" / "out" / "config.json").is_file()
    assert graft.plan(recipe, tmp_path / "run").steps["soup"].state == "run"
