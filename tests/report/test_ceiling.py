"""Averaging beside ensembling: which pairs there are, what they gain, and what is said of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fabricate as fake

from graft.report.ceiling import draw_ceiling, said, twins
from graft.report.page import render_page
from graft.report.read import read_run


@pytest.fixture
def run(tmp_path):
    return fake.family(tmp_path / "run")


def test_gains_are_over_the_best_parent_in_percent(run):
    found = {twin.column.on: twin for twin in twins(read_run(run))}
    assert set(found) == set(fake.SCORES)
    mixed = found["mixed.test"]
    assert (mixed.merge, mixed.ensemble, mixed.parent) == ("soup", "duo", "coder")
    assert mixed.merged == pytest.approx(100 * (2.54 - 2.41) / 2.54)
    assert mixed.together == pytest.approx(100 * (2.54 - 2.29) / 2.54)
    assert found["code.test"].merged == pytest.approx(100 * (2.12 - 2.31) / 2.12)


def test_what_is_said_names_where_averaging_hurts(run):
    words = said(read_run(run))
    assert words.startswith("The ensemble is ahead of the average in 3 of 3 cases.")
    assert "soup on code.test" in words
    assert "soup on prose.test" in words
    assert "mixed" not in words


def test_the_page_has_the_picture_where_there_is_a_pair(run):
    page = render_page(read_run(run))
    assert "Averaging against ensembling" in page
    assert "soup, mixed.test" in page


def test_the_base_of_a_task_vector_merge_is_no_parent_to_compare_with(run):
    fake.manifest(run, "ties", "merge", ["base", "coder", "writer"], settings={"method": "ties", "base": "base"})
    assert {twin.merge for twin in twins(read_run(run))} == {"soup"}, "ties was not measured"


def test_without_an_ensemble_of_the_same_models_there_is_no_picture(tmp_path):
    fake.manifest(tmp_path, "base", "pretrain", [])
    fake.manifest(tmp_path, "coder", "tune", ["base"])
    fake.write_rows(tmp_path, [fake.score(name, "code.test", 2.0) for name in ("base", "coder")])
    assert draw_ceiling(read_run(tmp_path)) == ""
