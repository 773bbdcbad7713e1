"""What is read: files that are no recipes, YAML and its newer rules, files that may not be read."""

from __future__ import annotations

import pytest
from recipe_problems import problems

from graft.errors import RequestError
from graft.recipe import read_recipe
from graft.yaml_lines import read_yaml

pytestmark = pytest.mark.usefixtures("growing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("family: f\nmodels: [1\nb: 2", "line 3: this is not YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("- a\n- b", "line 1: expected the sections family, seed, data, models, evaluate, report, found a list"),
        ("", "expected the sections family, seed, data, models, evaluate, report, found nothing"),
        (" \n\n", "expected the sections family, seed, data, models, evaluate, report, found nothing"),
        ("# nothing yet\n", "expected the sections family, seed, data, models, evaluate, report, found nothing"),
        (
            "just words",
            "line 1: expected the sections family, seed, data, models, evaluate, report, found the text",
        ),
        ("family: f", "line 1: models: this key is required and missing"),
        ("family: a/b\nmodels: {a: {grow: }}", "line 1: family: expected a name of letters, digits, - and _"),
        ("family: f\nmodels: {a.dev: {grow: }}", "line 2: models.a.dev: expected a name of letters, digits, - and _"),
        (
            "family: f\nmodels:\n  a: {grow: }\n  a: {grow: }",
            "line 4: models.a: this key stands twice; the first is on",
        ),
        ("family: f\nmodels: {a: {grow: , tune: }}", "line 2: models.a: expected one verb with its settings"),
        (
            "family: f\nmodels: {a: {grow: , seed: x}}",
            "line 2: models.a.seed: expected a whole number from 0, found 'x'",
        ),
        (
            "family: f\nmodels: {a: {load: ./there}}",
            "line 2: models.a.load: expected a model's folder (with config.json)",
        ),
    ],
)
def test_a_file_that_is_no_recipe_says_why(recipe, text, expected):
    (problem,) = problems(recipe(text))
    assert problem.startswith(expected)


def test_a_file_that_is_not_there_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match=r"expected a recipe \(a YAML file\) at .*none.yaml"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "found a folder"),
        (b"\x89PNG\r\n\0\0", "found binary data"),
        ("family: f\n# caf\u00e9\n".encode("latin-1"), "in UTF-8, found byte 0xe9 in line 2"),
    ],
)
def test_a_folder_and_what_is_no_text_are_wrong_requests(tmp_path, content, expected):
    path = tmp_path / "recipe.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        read_recipe(path)
    assert str(error.value).endswith(expected)
    assert str(error.value).startswith(f"expected a recipe (a YAML file) at {path}, ")


def test_files_that_may_not_be_read_are_named(recipe, tmp_path, monkeypatch):
    path = recipe("family: f\ndata: {d: {source: text, path: d.txt}}\nmodels: {a: {grow: }}\n")
    forbid(monkeypatch, "graft.data.files.open", tmp_path / "d.txt")
    (problem,) = problems(path)
    assert problem == f"line 2: data.d: {tmp_path}/d.txt: may not be read; change its permissions"
    forbid(monkeypatch, "pathlib.io.open", path)
    with pytest.raises(RequestError, match=r"found one that may not be read; change its permissions"):
        read_recipe(path)


def test_models_that_may_not_be_read_are_told_with_their_line(recipe, tmp_path, monkeypatch):
    path = recipe("family: f\nmodels:\n  a: {load: there}\n  b: {load: there}\n")

    def refused(error):
        monkeypatch.setattr("graft._load.Load.located", lambda *args: (_ for _ in ()).throw(error))

    refused(PermissionError(13, "Permission denied", "there/config.json"))
    first, second = problems(path)
    assert first.startswith("line 3: models.a.load: there/config.json: permission denied; change its permissions")
    assert second.startswith("line 4: models.b.load:")
    refused(PermissionError(1, "Operation not permitted"))  # no file's: not the reader's to mend
    with pytest.raises(PermissionError):
        read_recipe(path)


def forbid(monkeypatch, name, path):
    """Opening this file is refused, as it is to people who may not read it (whoever runs the tests may read all)."""

    def opened(file, *args, **more):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return open(file, *args, **more)

    monkeypatch.setattr(name, opened, raising=False)


def test_a_recipe_may_begin_with_a_mark_of_its_encoding(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbffamily: f\nmodels: {a: {grow: }}\n")
    assert read_recipe(path).family == "f"


def test_yaml_is_read_by_its_newer_rules():
    text = "{on: yes, off: [1e-3, 1:30, 007, 0x1f, 1_000, .5, ~, true, 2M tokens]}"
    assert read_yaml(text).value == {
        "on": "yes",
        "off": [0.001, "1:30", "007", 31, 1000, 0.5, None, True, "2M tokens"],
    }


def test_values_can_be_shared_by_anchor_and_keep_the_line_where_they_are_written():
    found = read_yaml("a: &common\n  steps: 3\nb:\n  <<: *common\n  kind: x\n")
    assert found.value["b"] == {"steps": 3, "kind": "x"}
    assert found.line(("b", "steps")) == 2
    assert found.line(("b", "kind", "a branch of a union")) == 5
    assert not found.problems


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: !!python/object/apply:os.system ['true']", "? [a, b]\n: 1", "a\tb:\n\t- c", "a: \x07"]
)
def test_yaml_that_would_do_harm_is_a_problem(text):
    assert read_yaml(text).problems
