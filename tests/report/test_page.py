"""The page is one file that needs nothing from outside, survives odd names and partial runs; names never overlap."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fabricate as fake
from hypothesis import given
from hypothesis import strategies as st

from graft import report
from graft.report import labels, svg, tree
from graft.report.cost import COSTS, cost_panel
from graft.report.curves import curves_of
from graft.report.read import Model, read_run

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Fails on tags that do not close in order; gathers attributes and words."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def page_of(folder: Path) -> tuple[str, Page]:
    source = report.write_report(folder).read_text()
    return source, Page(source)


def test_the_page_asks_nothing_of_the_network_and_runs_no_script(tmp_path):
    source, page = page_of(fake.family(tmp_path / "run"))
    assert "script" not in page.tags
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    assert "url(" not in source.replace("url(#plot)", "")
    assert "@import" not in source
    assert "http" not in source


def test_every_score_stands_on_the_page_with_its_weights_and_interval(tmp_path):
    folder = fake.family(tmp_path / "run")
    _, page = page_of(folder)
    for by_model in fake.SCORES.values():
        for model, value in by_model.items():
            assert f"{value:.3f} ±0.030" in page.words
            assert f"{value - 0.03:.6g} – {value + 0.03:.6g}" in page.words
            assert f"hash-{model}"[:12] in page.words


def test_the_verdicts_stand_on_the_page_in_words(tmp_path):
    _, page = page_of(fake.family(tmp_path / "run"))
    assert "4 times a combination is worse than its best parent" in page.words
    assert "soup is worse than its best parent coder on code.test" in page.words
    assert "-0.230 against base, the best single model" in page.words


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b&c', "模型 один 🌱", "x" * 90])
def test_names_are_escaped_wherever_they_appear(tmp_path, name):
    rows = [fake.score(name, "<b>on</b>", 2.0), fake.score("other", "<b>on</b>", 2.5)]
    fake.write_rows(tmp_path, rows)
    source, page = page_of(tmp_path)
    assert "<script" not in source
    assert "<b>on" not in source
    assert name in page.words


@pytest.mark.parametrize("content", ["", "family: none\nmodels: {a: {pretrain: {data: x}}, b: {tune: {from: a}}}"])
def test_a_run_without_rows_still_has_a_page(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    _, page = page_of(tmp_path)
    assert "All figures" in page.words
    assert "Scores" not in page.words
    assert ("not made yet: a, b" in page.words) is bool(content)


def test_rows_without_interval_cost_or_hash_are_shown(tmp_path):
    bare = {"kind": "score", "model": "m", "metric": "accuracy", "on": "quiz", "value": 1, "higher_is_better": True}
    fake.write_rows(tmp_path, [bare])
    assert "1.000" in page_of(tmp_path)[1].words


def test_huge_and_tiny_scores_are_written_short(tmp_path):
    for on, value, error in (("wide", 1_234_567.0, 30_000.0), ("narrow", 0.00123, 0.0001), ("whole", 245.0, 31.0)):
        rows = [fake.score(m, on, value + i * error, low=value - error, high=value + error) for i, m in enumerate("ab")]
        fake.write_rows(tmp_path, rows)
        words = page_of(tmp_path)[1].words
        assert {"wide": "1.235M ±30000", "narrow": "0.00123 ±0.00010", "whole": "245 ±31"}[on] in words


def test_forty_models_make_a_page_whose_drawings_are_well_formed(tmp_path):
    folder = fake.family(tmp_path / "run")
    for index in range(40):
        fake.manifest(folder, f"member{index}", "tune", ["base"])
    fake.manifest(folder, "crowd", "ensemble", [f"member{i}" for i in range(40)])
    source, page = page_of(folder)
    drawings = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(drawings) == page.tags.count("svg")
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_boxes_of_the_tree_do_not_overlap_and_parents_stand_left(tmp_path):
    folder = fake.family(tmp_path / "run")
    fake.manifest(folder, "late", "merge", ["base", "soup", "duo"])
    run = read_run(folder)
    drawn = ElementTree.fromstring(tree.draw_tree(run))
    boxes = {
        g.find("text").text: tuple(float(g.find("rect").get(k)) for k in ("x", "y", "width", "height"))
        for g in drawn.iter("g")
        if (g.get("class") or "").startswith("node")
    }
    assert set(boxes) == set(run.models)
    for (x, y, w, h), (u, v, _, _) in itertools.combinations(boxes.values(), 2):
        assert x + w <= u or u + w <= x or y + h <= v or v + h <= y
    for model in run.models.values():
        assert all(boxes[p][0] + boxes[p][2] < boxes[model.name][0] for p in model.parents)


def test_lines_are_as_wide_as_the_weights_that_were_fitted(tmp_path):
    folder = fake.family(tmp_path / "run")
    path = folder / "models" / "duo" / "graft.json"
    manifest = json.loads(path.read_text()) | {"metrics": {"weights": {"coder": 0.9, "writer": 0.1}}}
    path.write_text(json.dumps(manifest))
    drawn = ElementTree.fromstring(tree.draw_tree(read_run(folder)))
    widths = {p.find("title").text: float(p.get("stroke-width")) for p in drawn.iter("path")}
    assert widths["coder → duo, weight 0.9"] == pytest.approx(0.8 + 3.7 * 0.9, abs=0.01)
    assert widths["writer → duo, weight 0.1"] == pytest.approx(0.8 + 3.7 * 0.1, abs=0.01)
    assert widths["coder → soup"] == 1.6


def test_a_line_over_several_layers_passes_no_box_of_the_layers_between():
    models = {n: Model(n, "tune", p) for n, p in {"a": (), "b": ("a",), "c": ("b",), "d": ("a", "c")}.items()}
    layers = tree.layers_of(models)
    assert layers == {"a": 0, "b": 1, "c": 2, "d": 3}
    (far,) = [chain for chain in tree._chains("d", models, layers) if chain[0][0] == "a"]
    assert far == [("a", 0), ("a", 1), ("a", 2), ("d", 3)]


def test_parents_that_form_a_circle_are_drawn_all_the_same():
    models = {"a": Model("a", "merge", ("b",)), "b": Model("b", "merge", ("a",))}
    assert sorted(tree.layers_of(models)) == ["a", "b"]


def test_names_of_crowded_dots_do_not_overlap(tmp_path):
    rows = [fake.score(f"model-{i}", "x", 2.0 + i * 0.004) for i in range(9)]
    fake.write_rows(tmp_path, rows)
    run = read_run(tmp_path)
    drawn = ElementTree.fromstring(cost_panel(run, run.columns[0], COSTS[0]))
    found = [t for t in drawn.iter("text") if t.get("class") == "label"]
    boxes = []
    for word in found:
        box = labels._label(word.text, float(word.get("x")), float(word.get("y")), word.get("text-anchor")).box
        boxes.append(box)
    assert len(boxes) == 9
    assert all(labels._overlap(a, b) < 1.0 for a, b in itertools.combinations(boxes, 2))


def test_a_branch_starts_where_its_parent_ended(tmp_path):
    curves = {c.model.name: c for c in curves_of(read_run(fake.family(tmp_path / "run")))}
    assert set(curves) == {"base", "coder", "writer"}
    assert curves["base"].end[0] == 60 * 8192
    assert curves["coder"].loss[0][0] == 61 * 8192
    losses = [v for _, v in curves["base"].loss]
    assert curves["base"].mean[-1][1] == pytest.approx(sum(losses[-2:]) / 2)
    assert curves["base"].mean[30][1] == pytest.approx(sum(losses[29:32]) / 3)
    assert [t for t, _ in curves["base"].dev] == [20 * 8192, 40 * 8192, 60 * 8192]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_lie_inside_evenly_and_their_labels_tell_them_apart(low, span, count):
    marks = svg.ticks(low, low + span, count)
    slack = span * 1e-6 + 2 * math.ulp(abs(low) + span)  # of sums in double precision
    assert all(low - slack <= v <= low + span + slack for v in marks.values)
    steps = [b - a for a, b in itertools.pairwise(marks.values)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)
    if span > abs(low) * 1e-9:
        assert len({marks.label(v) for v in marks.values}) == len(marks.values)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_spread_keeps_the_gap_and_the_order_and_moves_nothing_without_need(wanted):
    placed = svg.spread(wanted, 5, 0, 100)
    ranked = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    assert all(placed[b] - placed[a] >= 5 - 1e-6 for a, b in itertools.pairwise(ranked))
    assert all(-1e-6 <= p <= 100 + 1e-6 for p in placed)
    if all(abs(a - b) >= 5 for a, b in itertools.combinations(wanted, 2)):
        assert placed == pytest.approx(wanted)


def test_the_page_is_replaced_as_a_whole(tmp_path):
    folder = fake.family(tmp_path / "run")
    first = report.write_report(folder)
    before = first.read_text()
    fake.write_rows(folder, [])
    assert report.write_report(folder) == first
    assert len(first.read_text()) < len(before)
    assert sorted(p.name for p in folder.iterdir()) == ["models", "report.html", "results.jsonl"]
    assert json.loads((folder / "models" / "base" / "graft.json").read_text())["name"] == "base"


def speech(folder: Path, text: dict) -> None:
    (folder / "models" / "duo" / "speaks.json").write_text(json.dumps(text))


SPEECH = {
    "on": "mixed.dev",
    "mean_shares": {"coder": 0.7, "<writer>": 0.3},
    "tokens": [
        {
            "token": token,
            "members": {
                "coder": {"weight": 0.6, "probability": 0.5, "share": share},
                "<writer>": {"weight": 0.4, "probability": 0.25, "share": 1 - share},
            },
        }
        for token, share in [("if ", 0.9), ("a < b", 0.8), ("\n", 0.4)]
    ],
}


def test_a_mixtures_text_is_shown_with_every_members_part_on_hovering(tmp_path):
    folder = fake.family(tmp_path / "run")
    speech(folder, SPEECH)
    source, page = page_of(folder)
    assert "Who speaks" in page.words
    assert "if a < b\n" in page.words
    told = [value for name, value in page.attributes if name == "title" and value and "coder: 0.600" in value]
    assert told[0] == "coder: 0.600 × 0.5 = 90%\n<writer>: 0.400 × 0.25 = 10%"
    assert len(told) == 3
    assert "script" not in page.tags
    assert "<writer>" not in source


@pytest.mark.parametrize("damage", [{"tokens": []}, {"mean_shares": {}, "tokens": [{"token": "a"}]}, []])
def test_a_text_that_cannot_be_read_is_left_out(tmp_path, damage):
    folder = fake.family(tmp_path / "run")
    assert "Who speaks" not in page_of(folder)[1].words
    speech(folder, damage)
    assert "Who speaks" not in page_of(folder)[1].words
