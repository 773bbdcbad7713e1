"""The report says what packing costs in each score and what tuning on packed weights wins back."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fabricate as fake
from rich.console import Console

from graft import report

LORA = {"method": {"lora": {"rank": 8}}, "data": "mail", "budget": "40 steps", "length": 128}
VALUES = {"base": 2.40, "four": 2.50, "back": 2.30, "plain": 2.28, "other": 2.20, "hasty": 2.10}


def packed_family(folder, values=VALUES, **row):
    fake.manifest(folder, "base", "pretrain", [])
    fake.manifest(folder, "four", "quantize", ["base"], settings={"from": "base", "bits": 4})
    fake.manifest(folder, "whole", "quantize", ["four"], settings={"from": "four", "bits": 16})
    fake.manifest(folder, "back", "tune", ["four"], settings={"from": "four", "optimizer": "adamw_8bit", **LORA})
    hasty = {"from": "base", "warmup": 0.5, **LORA}
    fake.manifest(folder, "hasty", "tune", ["base"], settings=hasty)
    fake.manifest(folder, "plain", "tune", ["base"], settings={"from": "base", "optimizer": "adamw", **LORA})
    fake.manifest(folder, "other", "tune", ["base"], settings={"from": "base", **LORA, "budget": "9 steps"})
    pairs = [("base", "four"), ("back", "four"), ("base", "back"), ("plain", "back")]
    compared = [fake.comparison(a, b, "mail.test", values[a] - values[b], 0.0004, **row) for a, b in pairs]
    fake.write_rows(folder, [*(fake.score(m, "mail.test", v, **row) for m, v in values.items()), *compared])
    return folder


def test_what_packing_costs_and_tuning_wins_back(tmp_path):
    (found,) = report.summary(packed_family(tmp_path / "run"))["quantised"]
    assert (found["name"], found["bits"], found["cost"]["other"]) == ("four", 4, "base")
    assert (found["cost"]["worse_by"], found["cost"]["half"], found["cost"]["p"]) == (
        pytest.approx(0.1), pytest.approx(0.02), 0.0004
    )  # fmt: skip
    (back,) = found["tuned"]
    gaps = {name: back[name]["worse_by"] for name in ("packed", "base", "alike")}
    assert gaps == pytest.approx({"packed": -0.2, "base": -0.1, "alike": 0.02})
    assert back["alike"]["other"] == "plain"


def test_where_more_is_better_less_is_a_cost(tmp_path):
    better = {"higher_is_better": True, "metric": "accuracy"}
    values = {"base": 0.80, "four": 0.70, "back": 0.75, "plain": 0.90}
    (found,) = report.summary(packed_family(tmp_path / "run", values, **better))["quantised"]
    assert found["cost"]["worse_by"] == pytest.approx(0.1)
    assert found["tuned"][0]["packed"]["worse_by"] == pytest.approx(-0.05)
    assert found["tuned"][0]["base"]["worse_by"] == pytest.approx(0.05)


def test_it_is_said_in_words_and_on_the_page(tmp_path):
    folder = packed_family(tmp_path / "run")
    console = Console(width=400)
    with console.capture() as captured:
        console.print(report.table(folder))
    (line,) = [line for line in captured.get().splitlines() if line.startswith("four: ")]
    assert line.startswith(
        "four: packing base into 4 bits costs 0.100 ±0.020 (p < 0.001) on mail.test · bits per byte, 2.400 → 2.500; "
        "back, tuned on it, wins back 0.200 ±0.020 (p < 0.001) and is 0.100 ±0.020 (p < 0.001) better than base"
    )
    assert "0.020 ±0.020 (p < 0.001) worse than the same tuning on plain weights, plain" in line
    page = " ".join(re.sub(r"<[^>]+>", " ", report.write_report(folder).read_text()).split())
    assert "mail.test · bits per byte four 2.500 base +0.100 ±0.020 &lt; 0.001" in page
    assert "quantize 4 bits" in page


def test_a_loss_that_is_not_won_back_and_a_pair_that_was_not_tested_are_told_so(tmp_path):
    folder = packed_family(tmp_path / "run", {"base": 2.4, "four": 2.5, "back": 2.6, "plain": 2.6})
    fake.write_rows(folder, [fake.score(m, "mail.test", v) for m, v in (("base", 2.4), ("four", 2.5), ("back", 2.6))])
    (found,) = report.summary(folder)["quantised"]
    assert (found["cost"]["half"], found["cost"]["p"], found["tuned"][0]["alike"]) == (None, None, None)
    console = Console(width=400)
    with console.capture() as captured:
        console.print(report.table(folder))
    assert "costs 0.100 on mail.test · bits per byte, 2.400 → 2.500; back, tuned on it, wins nothing back (2.600)" in (
        captured.get()
    )
