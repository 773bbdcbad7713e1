"""The report says which model is best, where a combination lost to a parent, and what it could not read."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fabricate as fake
from rich.console import Console

from graft import report
from graft.errors import RequestError
from graft.evaluate.results import VERSION
from graft.report.judge import places_for
from graft.report.read import Model


def text_of(renderable, width: int = 240) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def scores_of(folder: Path, name: str) -> dict[str, dict]:
    (model,) = [m for m in report.summary(folder)["models"] if m["name"] == name]
    return {s["on"]: s for s in model["scores"]}


def test_the_lowest_bits_are_best_in_each_column(tmp_path):
    folder = fake.family(tmp_path / "run")
    best = {s["on"]: m["name"] for m in report.summary(folder)["models"] for s in m["scores"] if s["best"]}
    assert best == {"code.test": "coder", "prose.test": "writer", "mixed.test": "duo"}


def test_the_highest_accuracy_is_best(tmp_path):
    row = {"higher_is_better": True, "metric": "accuracy"}
    fake.write_rows(tmp_path, [fake.score("a", "quiz", 0.4, **row), fake.score("b", "quiz", 0.6, **row)])
    assert [m["scores"][0]["best"] for m in report.summary(tmp_path)["models"]] == [False, True]


def test_models_that_are_level_are_best_together(tmp_path):
    row = {"higher_is_better": True, "metric": "accuracy"}
    fake.write_rows(tmp_path, [fake.score(name, "quiz", value, **row) for name, value in (("a", 0), ("b", 0))])
    assert [m["scores"][0]["best"] for m in report.summary(tmp_path)["models"]] == [True, True]
    assert "level with b" in report.write_report(tmp_path).read_text()


def test_a_combination_is_held_against_its_best_parent(tmp_path):
    found = scores_of(fake.family(tmp_path / "run"), "soup")
    lost, won = found["code.test"]["against_best_parent"], found["mixed.test"]["against_best_parent"]
    assert (lost["best_parent"], lost["worse"], lost["significant"]) == ("coder", True, True)
    assert lost["difference"] == pytest.approx(2.31 - 2.12)
    assert (won["best_parent"], won["worse"], won["p"]) == ("coder", False, 0.0004)


def test_a_loss_within_chance_is_not_called_significant(tmp_path):
    folder = fake.family(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    fake.write_rows(folder, [row | {"p": 0.2} if row["kind"] == "comparison" else row for row in rows])
    found = scores_of(folder, "soup")["code.test"]["against_best_parent"]
    assert found["worse"]
    assert not found["significant"]
    assert "soup is worse than its best parent on ▽ code.test" in text_of(report.table(folder))


def test_the_table_shows_interval_cost_and_flag(tmp_path):
    shown = text_of(report.table(fake.family(tmp_path / "run")))
    assert "2.310 ±0.030 ▼" in shown
    assert "soup is worse than its best parent on ▼ code.test · bits per byte: 2.310, coder 2.120" in shown
    assert "(p < 0.001, paired bootstrap)" in shown
    assert "20.9k" in shown
    assert "24.8 MB" in shown


def test_a_narrow_terminal_gets_more_tables_and_cuts_no_number(tmp_path):
    folder = fake.family(tmp_path / "run")
    shown = text_of(report.table(folder), width=64)
    assert "…" not in shown
    assert all(f"{value:.3f} ±0.030" in shown for by_model in fake.SCORES.values() for value in by_model.values())
    assert max(len(line) for line in shown.splitlines()) <= 64


def test_rows_of_weights_that_have_changed_are_left_out_and_said(tmp_path):
    folder = fake.family(tmp_path / "run")
    manifest = folder / "models" / "soup" / "graft.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"hash": "other"}))
    found = report.summary(folder)
    assert [len(m["scores"]) for m in found["models"] if m["name"] == "soup"] == [0]
    assert any("soup" in problem and "left out" in problem for problem in found["problems"])
    assert not any("soup" in row["models"] for row in found["comparisons"])


def test_a_later_row_replaces_an_earlier_one(tmp_path):
    fake.write_rows(tmp_path, [fake.score("a", "x", 2.0), fake.score("a", "x", 1.5)])
    (model,) = report.summary(tmp_path)["models"]
    assert [s["value"] for s in model["scores"]] == [1.5]


def test_rows_of_an_older_evaluation_are_left_out_beside_newer_ones_and_said(tmp_path):
    folder = fake.family(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    old = [row | {"evaluation": 1} if row.get("model") == "soup" and row["on"] == "code.test" else row for row in rows]
    fake.write_rows(folder, old)
    found = report.summary(folder)
    assert "code.test" not in scores_of(folder, "soup")
    assert "prose.test" in scores_of(folder, "soup")
    (said,) = [problem for problem in found["problems"] if "older version of the evaluation" in problem]
    assert re.search(r"left out: soup \(.*code\.test.*\); measure these models again", said)
    assert said in text_of(report.table(folder), width=2000)


def test_a_column_of_another_evaluation_is_shown_and_said(tmp_path):
    rows = [fake.score("a", "x", 2.0), fake.score("b", "x", 1.0), fake.comparison("a", "b", "x", 1.0, 0.01)]
    del rows[0]["evaluation"]
    fake.write_rows(tmp_path, [rows[0], *({k: v for k, v in row.items() if k != "evaluation"} for row in rows)])
    found = report.summary(tmp_path)
    assert [score["value"] for model in found["models"] for score in model["scores"]] == [2.0, 1.0]
    assert len(found["comparisons"]) == 1
    (said,) = [problem for problem in found["problems"] if "version of the evaluation" in problem]
    assert said.startswith("measured by another version of the evaluation, which may give other numbers now: ")
    fake.write_rows(tmp_path, [*rows, fake.score("a", "x", 2.5)])
    newer = report.summary(tmp_path)
    assert [score["value"] for model in newer["models"] for score in model["scores"]] == [2.5, 1.0]
    assert not [problem for problem in newer["problems"] if "version of the evaluation" in problem]


def test_an_older_row_behind_a_newer_one_does_not_take_its_place(tmp_path):
    fake.write_rows(tmp_path, [fake.score("a", "x", 2.0), fake.score("a", "x", 1.5, evaluation=VERSION - 1)])
    (model,) = report.summary(tmp_path)["models"]
    assert [s["value"] for s in model["scores"]] == [2.0]


def test_an_unfinished_run_is_reported_with_what_there_is(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "family: f\nmodels:\n  base: {pretrain: {data: x, size: 1M, budget: 1M}}\n"
        "  x: {seed: 3, tune: {from: base, data: base, budget: 1M}}\n"
    )
    fake.manifest(tmp_path, "base", "pretrain", [])
    found = report.summary(tmp_path)
    assert [(m["name"], m["made"], m["parents"]) for m in found["models"]] == [
        ("base", True, []),
        ("x", False, ["base"]),
    ]
    assert "not made yet: x" in found["problems"]
    assert "tune, not made" in text_of(report.table(tmp_path))


def test_torn_lines_broken_manifests_and_odd_values_are_named_not_fatal(tmp_path):
    folder = fake.family(tmp_path / "run")
    (folder / "models" / "writer" / "graft.json").write_text("{")
    with (folder / "results.jsonl").open("a") as rows:
        rows.write(json.dumps(fake.score("coder", "code.test", float("nan"))) + "\n" + '{"kind": "sco')
    found = report.summary(folder)
    assert any("models/writer/graft.json: the manifest is damaged" in p for p in found["problems"])
    assert any("is not a JSON object" in p for p in found["problems"])
    assert scores_of(folder, "coder")["code.test"]["value"] == 2.12


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds none of models, results\.jsonl, recipe\.yaml"):
        report.summary(tmp_path)
    with pytest.raises(RequestError, match="found nothing at"):
        report.table(tmp_path / "nowhere")


def test_decimals_follow_the_width_of_the_interval(tmp_path):
    rows = [
        fake.score("a", "x", 2.31041, low=2.31031, high=2.31051),
        fake.score("b", "x", 2.31, low=1.41, high=3.21),
        fake.score("c", "x", 2.5, low=2.5, high=2.5),
    ]
    fake.write_rows(tmp_path, rows)
    shown = text_of(report.table(tmp_path))
    assert "2.3104 ±0.0001" in shown
    assert "2.5000 ±0.0000" in shown  # an interval that is a point


@pytest.mark.parametrize(
    ("halves", "places"),
    [([], 3), ([0.0], 3), ([0.03], 3), ([12.0], 0), ([0.9], 2), ([0.9, 0.9, 0.001], 3), ([1e-9], 6), ([0, 0, 0.02], 3)],
)
def test_two_digits_of_the_usual_interval_and_one_of_the_narrowest_are_shown(halves, places):
    assert places_for(halves) == places


def test_a_difference_is_written_with_the_digits_of_its_own_interval(tmp_path):
    folder = fake.family(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    tiny = {"difference": -0.00042, "low": -0.00061, "high": -0.00022}
    values = {"soup": 2.31042, "coder": 2.31}
    rows = [
        row | (tiny if row["kind"] == "comparison" else {"value": values.get(row["model"], row["value"])})
        for row in rows
        if row["on"] == "code.test"
    ]
    fake.write_rows(folder, rows)
    page = report.write_report(folder).read_text()
    assert "0.00042 <small>±0.00020</small>" in page
    assert "code.test · bits per byte: 2.3104, coder 2.3100" in text_of(report.table(folder))


def test_a_model_that_was_measured_where_it_lies_is_called_by_its_folder(tmp_path):
    fake.manifest(tmp_path / "run", "base", "pretrain", [])
    fake.manifest(tmp_path / "run", "coder", "tune", ["base"])
    models = tmp_path / "run" / "models"
    rows = [
        fake.score("plain", "x", 2.0, folder=str(tmp_path / "gpt2")),
        fake.score("base", "x", 1.9, folder=str(models / "base")),
        fake.score("mine", "x", 1.8, folder=str(models / "coder"), model_hash="hash-coder"),
        fake.score("changed", "x", 1.7, folder=str(models / "coder"), model_hash="hash-of-before"),
        fake.score("old", "x", 1.6),
    ]
    fake.write_rows(tmp_path / "eval", rows)
    models_there = {model["name"]: model for model in report.summary(tmp_path / "eval")["models"]}
    assert models_there["mine"]["parents"] == ["base"]
    assert len(models_there["changed"]["scores"]) == 1
    shown = text_of(report.table(tmp_path / "eval"))
    for name, kind in {
        "plain": f"the folder {tmp_path / 'gpt2'}",
        "base": "pretrain linear",
        "mine": "tune full",
        "changed": f"the folder {models / 'coder'}",
        "old": "a finished model",
    }.items():
        assert any(line.split()[0] == name and kind in line for line in shown.splitlines() if line.strip())
    page = report.write_report(tmp_path / "eval").read_text()
    assert f"A finished model without a manifest, measured in the folder {tmp_path / 'gpt2'}." in page


def test_a_parent_that_stands_for_several_members_has_the_sum_of_their_weights():
    weights = {"a.1": 0.1, "a.2": 0.2, "b-step-400": 0.1, "b-step-800.1": 0.2, "b-ema": 0.05, "b-2": 0.35}
    model = Model("duo", "ensemble", ("a", "b", "b-2", "c"), {"metrics": {"weights": weights}})
    found = {parent: model.weight_of(parent) for parent in model.parents}
    assert found == {"a": pytest.approx(0.3), "b": pytest.approx(0.35), "b-2": 0.35, "c": None}
    soup = Model("soup", "merge", ("a", "b"), {"settings": {"models": {"a": 1, "b": None}}})
    assert [soup.weight_of(parent) for parent in "ab"] == [1.0, None]
