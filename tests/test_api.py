"""The Python face: rooms that can be called, one node without a recipe, and nothing heavy before it is asked for."""

from __future__ import annotations

import json

import pytest

import graft
from graft.errors import DataError, RecipeError, RequestError
from graft.lineage import read_manifest
from graft.one import data_at, data_named, make_one


def test_rooms_are_callable_whether_they_were_imported_first_or_not():
    import graft.plan
    import graft.run
    import graft.tree
    from graft.run import run

    assert callable(graft.run)
    assert callable(graft.plan)
    assert callable(graft.tree)
    assert graft.run.run is run
    assert all(callable(getattr(graft, name)) for name in ("load", "chat", "report", "tune", "pretrain", "ensemble"))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'graft' has no attribute 'mrege'"):
        graft.mrege  # noqa: B018


def test_a_run_a_plan_and_a_tree_from_python(tmp_path, growing):
    recipe = tmp_path / "family.yaml"
    recipe.write_text(
        "family: f\nmodels:\n  a: {grow: }\n  b: {grow: {parents: [a]}}\n  c: {grow: {parents: [a]}}\n"
        "  d: {grow: {parents: [b, c]}}\n"
    )
    folder = tmp_path / "run"
    assert [step.state for step in graft.plan(recipe, folder).steps.values()] == ["run"] * 4
    assert graft.run(recipe, folder).made == ["a", "b", "c", "d"]
    assert [step.state for step in graft.plan(recipe, folder).steps.values()] == ["cached"] * 4
    parents = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    for place in (recipe, folder, folder / "models" / "d"):
        assert {name: member.parents for name, member in graft.tree(place).items()} == parents
    assert set(graft.tree(folder / "models" / "b")) == {"a", "b"}


def test_a_tree_names_ancestors_that_are_gone(tmp_path, growing):
    make_one("grow", tmp_path / "mother", {})
    make_one("grow", tmp_path / "child", {"parents": [str(tmp_path / "mother")]})
    (tmp_path / "mother").rename(tmp_path / "moved")
    assert [(m.name, m.verb) for m in graft.tree(tmp_path / "child").values()] == [
        (str(tmp_path / "mother"), "gone"),
        ("child", "grow"),
    ]


def test_one_node_is_cached_and_remade_by_the_same_rules_as_in_a_run(tmp_path, growing):
    journal = tmp_path / "journal"
    for steps, lines, force in ((2, 2, False), (2, 2, False), (3, 5, True)):
        make_one("grow", tmp_path / "a", {"steps": steps, "journal": str(journal)}, force=force)
        assert len(journal.read_text().splitlines()) == lines
    make_one("grow", tmp_path / "a", {"steps": 3, "journal": str(journal)}, force=True)
    assert len(journal.read_text().splitlines()) == 8
    make_one("grow", tmp_path / "b", {"parents": [str(tmp_path / "a")]})
    manifest = read_manifest(tmp_path / "b")
    assert [(parent.path, parent.hash) for parent in manifest.parents] == [("../a", read_manifest(tmp_path / "a").hash)]


def test_one_node_refuses_what_is_not_there_and_what_it_would_overwrite(tmp_path, growing):
    with pytest.raises(RequestError, match="expected a folder to write, found an empty name"):
        make_one("grow", "", {})
    with pytest.raises(RequestError, match="expected a model's folder, found none at nowhere"):
        make_one("grow", tmp_path / "a", {"parents": ["nowhere"]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="is there already and was not made by graft"):
        make_one("grow", tmp_path / "mine", {})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    make_one("grow", tmp_path / "e", {"kind": "encoder"})
    make_one("grow", tmp_path / "d", {"kind": "decoder"})
    with pytest.raises(RecipeError, match="parents of one kind"):
        make_one("grow", tmp_path / "both", {"parents": [str(tmp_path / "d"), str(tmp_path / "e")]})


def test_a_model_that_was_made_otherwise_is_replaced_only_when_told_to(tmp_path, growing):
    folder = make_one("grow", tmp_path / "a", {}, seed=0)
    before = read_manifest(folder)
    with pytest.raises(RequestError, match=r"say `force=True` \(--force\) to replace it"):
        make_one("grow", folder, {}, seed=1)
    assert read_manifest(folder) == before
    make_one("grow", folder, {}, seed=1, force=True)
    assert read_manifest(folder).seed == 1


def test_measuring_a_folder_that_is_not_there_is_a_wrong_request(tmp_path):
    library = {"source": "python-library", "packages": ["json"], "splits": {"test": 0.5}}
    measures = [{"measure": "bits_per_byte", "on": ["d.test"]}]
    with pytest.raises(RequestError, match=r"expected a model's folder with config.json"):
        graft.evaluate([tmp_path / "nobody"], measures, data_sets={"d": library}, out=tmp_path)


def test_a_misspelt_split_of_a_data_set_is_shown_the_right_one(tmp_path):
    library = {"source": "python-library", "packages": ["json"]}
    measures = [{"measure": "bits_per_byte", "on": ["code.tset"]}]
    with pytest.raises(DataError, match=r"at code\.tset \(did you mean 'code\.test'\?\); data sets are: code, prose"):
        graft.evaluate([tmp_path], measures, data_sets={"code": library, "prose": library}, out=tmp_path)


def test_a_data_file_is_known_by_its_suffix(tmp_path):
    for name, source in (("a.jsonl", "jsonl"), ("b.csv.gz", "csv"), ("c.txt", "text"), ("d.parquet", "parquet")):
        (tmp_path / name).write_text("x")
        assert data_at(str(tmp_path / name)) == {"source": source, "path": str((tmp_path / name).resolve())}
    (tmp_path / "set.yaml").write_text("source: python-library\nkeep: code\n")
    assert data_at(str(tmp_path / "set.yaml")) == {"source": "python-library", "keep": "code"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.md").write_text("x")
    assert data_at(str(tmp_path / "folder"))["source"] == "text"
    (tmp_path / "code.py").write_text("x = 1\n")
    assert data_at(str(tmp_path / "code.py"))["source"] == "text"
    (tmp_path / "weights.bin").write_bytes(b"\x80\x00\xff")
    with pytest.raises(DataError, match=r"expected files of one kind, ending in one of .txt.*found none"):
        data_at(str(tmp_path / "weights.bin"))
    with pytest.raises(DataError, match=r"found nothing at nowhere\.jsonl"):
        data_at("nowhere.jsonl")
    with pytest.raises(DataError, match=r"found nothing at ''"):
        data_at("")


def test_a_file_is_read_whole_where_no_split_of_it_is_named_and_nobody_trains(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    (tmp_path / "own.yaml").write_text("source: text\npath: x.txt\n")
    a, b, own = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "own.yaml"))
    known = {"code": {"source": "python-library"}}
    found = data_named([a, b, f"{b}.test", own, "code.dev"], known)
    assert found.pop("code") == known["code"]
    assert found == {a: data_at(a) | {"splits": {"dev": 0, "test": 0}}, b: data_at(b), own: data_at(own)}
    assert data_named([a, "code"], known, whole=False) == known | {a: data_at(a)}
    with pytest.raises(DataError, match="data sets are: code"):
        data_named(["cod"], known)


def test_a_report_is_written_again_from_python(tmp_path, growing):
    recipe = tmp_path / "family.yaml"
    recipe.write_text("family: f\nmodels: {a: {grow: }}\n")
    graft.run(recipe, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    page = graft.report(tmp_path / "run")
    assert page.is_file()
    assert json.loads((tmp_path / "run/models/a/graft.json").read_text())["name"] == "a"
