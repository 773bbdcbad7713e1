"""Task vectors of merges in a report: what they are measured from, that they are measured once, and their pictures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fabricate as fake
import small_family
from typer.testing import CliRunner

import graft.deltas
from graft.cli import app
from graft.deltas import deltas
from graft.lineage import hash_model, read_manifest, stamps, write_manifest
from graft.report.page import render_page
from graft.report.read import read_run
from graft.report.vectors import vectors


def weights(run, name, model):
    """Give a fabricated model weights, and its manifest their hash."""
    folder = run / "models" / name
    small_family.save(model, folder)
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"hash": hash_model(folder), "files": stamps(folder)}))


@pytest.fixture
def run(tmp_path):
    """base → a, b, c; two merges of a and b, of which one names the base; one of a and a stranger."""
    root = tmp_path / "run"
    grown = {"base": [], "a": ["base"], "b": ["base"], "c": ["a"], "stranger": []}
    base = small_family.model(0)
    for number, (name, parents) in enumerate(grown.items()):
        fake.manifest(root, name, "tune" if parents else "load", parents)
        weights(root, name, base if name == "base" else small_family.model(number, near=base))
    fake.manifest(root, "soup", "merge", ["a", "b"])
    fake.manifest(root, "sum", "merge", ["base", "a", "b"], settings={"method": "task_arithmetic", "base": "base"})
    fake.manifest(root, "odd", "merge", ["stranger", "a"])
    return root


def test_merges_of_the_same_models_are_measured_from_what_those_come_from(run):
    found = {each.merges: each for each in vectors(read_run(run))}
    assert {each.merges: (each.base, each.models) for each in found.values()} == {
        ("soup", "sum"): ("base", ("a", "b")),
        ("odd",): ("stranger", ("a",)),
    }
    assert found["soup", "sum"].why == "the model that all of them come from"
    assert found["odd",].why == "the first of them, as no base is known"


def test_the_youngest_common_ancestor_may_be_one_of_the_models(run):
    fake.manifest(run, "late", "merge", ["c", "b"])
    fake.manifest(run, "near", "merge", ["a", "c"])
    found = {each.merges[0]: (each.base, each.models) for each in vectors(read_run(run))}
    assert found["late"] == ("base", ("c", "b"))
    assert found["near"] == ("a", ("c",))


def test_a_base_that_another_merge_names_is_taken_where_no_ancestor_is_known(run):
    settings = {"method": "ties", "base": "base"}
    fake.manifest(run, "ties", "merge", ["base", "stranger", "a"], settings=settings)
    found = {each.merges: (each.base, each.why) for each in vectors(read_run(run))}
    assert found["odd", "ties"] == ("base", "their base in ties")


def test_the_numbers_are_those_of_the_deltas_and_are_measured_once(run, monkeypatch):
    first = vectors(read_run(run))
    kept = [json.loads(path.read_text()) for path in (run / "cache" / "deltas").glob("*.json")]
    models = run / "models"
    asked = deltas(models / "base", {"a": models / "a", "b": models / "b"})
    assert len(kept) == 2, "two merges of the same models share what was measured"
    same = next(each for each in kept if len(each["models"]) == 2)
    assert same["whole"]["relative"] == pytest.approx(asked.whole.relative)
    assert same["whole"]["cosines"][0][1] == pytest.approx(asked.whole.cosines[0][1])
    monkeypatch.setattr(graft.deltas, "deltas", lambda *_, **__: pytest.fail("measured again"))
    assert vectors(read_run(run)) == first


def test_weights_that_have_changed_are_measured_anew(run):
    before = vectors(read_run(run))
    weights(run, "a", small_family.model(50, near=small_family.model(0), step=0.1))
    after = vectors(read_run(run))
    assert before[0].words != after[0].words
    assert len(list((run / "cache" / "deltas").glob("*.json"))) == 4


def test_a_recipe_may_switch_them_off(run):
    (run / "recipe.yaml").write_text("family: f\nreport: {deltas: false}\n")
    assert vectors(read_run(run)) == []
    assert not (run / "cache").exists()
    assert "What was merged" not in render_page(read_run(run))


def test_a_model_without_weights_is_named_and_the_rest_is_shown(run):
    (run / "models" / "stranger" / "model.safetensors").unlink()
    found = {each.merges[0]: each for each in vectors(read_run(run))}
    assert found["odd"].problem == "stranger: expected a folder with weights, found none"
    assert not found["soup"].problem
    assert "Not measured: stranger: expected" in render_page(read_run(run))


def test_the_page_has_lengths_signs_and_cosines_as_whole_drawings(run):
    page = render_page(read_run(run))
    for words in ("layer, attention", "layer, feed-forward", "contradicting signs by layer", "Cosines between"):
        assert words in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 9
    for drawing in drawings:
        ElementTree.fromstring(drawing)


@pytest.fixture
def hilly(run):
    """The run with a merge that has its barriers noted, and one of aligned models."""
    line = {"between": ["a", "b"], "shares": [0, 0.5, 1], "values": [2.0, 2.5, 2.2], "barrier": 0.4}
    barriers = {"metric": "bits_per_byte", "on": ["mixed.dev"], "lines": [line]}
    fake.manifest(run, "hilly", "merge", ["a", "b"], notes={"barriers": barriers})
    each = {"metric": "perplexity", "cosine_before": 0.1, "cosine_after": 0.4}
    each |= {
        "line_before": [2.0, None, 2.2],
        "barrier_before": None,
        "line_after": [2.0, 2.3, 2.2],
        "barrier_after": 0.2,
    }
    alignment = {"to": "a", "models": {"stranger": each}}
    settings = {"method": "rebasin", "on": "mixed.dev"}
    fake.manifest(run, "aligned", "merge", ["a", "stranger"], notes={"alignment": alignment}, settings=settings)
    return run


def test_the_lines_between_merged_models_are_drawn_with_their_barriers(hilly):
    page = render_page(read_run(hilly))
    assert "Between the merged models" in page
    for name in ("a – b (0.400)", "a – stranger before (–)", "a – stranger after (0.200)"):
        assert f"<title>{name}: 0: 2" in page
    assert "perplexity on mixed.dev" in page


def test_machines_are_told_the_numbers_behind_the_pictures(hilly):
    done = CliRunner().invoke(app, ["report", str(hilly), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    models = hilly / "models"
    asked = deltas(models / "base", {"a": models / "a", "b": models / "b"})
    told = next(each for each in found["task_vectors"] if each["models"] == ["a", "b"])
    assert (sorted(told["merges"]), told["base"]) == (["hilly", "soup", "sum"], "base")
    assert told["deltas"]["whole"]["relative"] == pytest.approx(asked.whole.relative)
    assert len(told["deltas"]["parts"]) == len(asked.parts)
    aligned, straight = found["barriers"]
    points = [[0.0, 2.0], [0.5, 2.5], [1.0, 2.2]]
    assert straight == {
        "merge": "hilly", "metric": "bits per byte", "on": "mixed.dev",
        "lines": [{"name": "a – b", "barrier": 0.4, "points": points}],
    }  # fmt: skip
    assert [(each["name"], each["barrier"]) for each in aligned["lines"]] == [
        ("a – stranger before", None),
        ("a – stranger after", 0.2),
    ]


def test_without_lines_nothing_is_said_of_them(run):
    assert "Between the merged models" not in render_page(read_run(run))


def test_a_long_name_of_a_line_is_written_whole():
    from graft.report.series import plot

    name = "a long name – another long name (0.123)"
    drawn = plot({name: [(0.0, 1.0), (1.0, 2.0)], "b": [(0.0, 2.0), (1.0, 1.0)]}, "lines", across="share")
    assert f">{name}</text>" in drawn
    assert "…" in plot({"x" * 200: [(0.0, 1.0), (1.0, 2.0)]}, "lines")


def test_numbers_on_dark_squares_are_white():
    from graft.report.series import cosines

    drawn = cosines(["a", "b"], [[1.0, 0.1], [0.1, -0.9]], "cosines")
    assert drawn.count("fill:#fff") == 2
