"""The whole length with real models: killed in training, in writing and in measuring, a family comes out the same."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

import pytest

from graft.lineage import read_manifest
from graft.run import run

FAMILY = """
family: tiny
data:
  code: {source: python-library, keep: code, packages: [json, wsgiref], pieces: 2000, splits: {dev: 0.2, test: 0.3}}
  prose: {source: python-library, keep: docstrings, packages: [json, logging], splits: {dev: 0.1, test: 0.2}}
  mixed: {mix: {code: 0.5, prose: 0.5}}
models:
  base:
    pretrain:
      {data: mixed, size: 60k, length: 32, dropout: 0.1, tokenizer: {size: 300}, budget: 30 steps, batch_size: 4,
       evaluate_every: 10, checkpoint_every: 2 steps}
  coder:
    tune: {from: base, data: code, budget: 16 steps, batch_size: 4, evaluate_every: 8, checkpoint_every: 2 steps}
  writer:
    tune: {from: base, data: prose, budget: 16 steps, batch_size: 4, evaluate_every: 8, checkpoint_every: 2 steps}
  soup: {merge: {method: linear, models: [coder, writer]}}
  duo: {ensemble: {combine: linear, members: [coder, writer], weights: {fit: mixed.dev, documents: 2}}}
evaluate:
  - {measure: bits_per_byte, on: [code.test, prose.test, mixed.test], limit: 5}
"""


RUN = "import sys; from graft.run import run; run(*sys.argv[1:])"


@pytest.fixture(scope="module")
def start(beside):
    """Starts a run in a process of its own, quickly."""
    return partial(beside.start, RUN)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(recipe, the folder of a run that was never killed, its seconds)."""
    place = tmp_path_factory.mktemp("tiny")
    recipe = place / "family.yaml"
    recipe.write_text(FAMILY)
    start.func("")  # the server is there before the clock runs
    began = time.monotonic()
    finish(start, recipe, place / "whole")
    return recipe, place / "whole", time.monotonic() - began


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("models/*/*.safetensors"))}


def scores(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = [(r["model"], r["on"], r["value"], r["low"], r["high"]) for r in rows if r["kind"] == "score"]
    found += [(*r["models"], r["on"], r["difference"], r["p"]) for r in rows if r["kind"] == "comparison"]
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: read_manifest(path).hash for path in sorted((folder / "models").iterdir())}


def finish(start, recipe, folder):
    process = start(recipe, folder)
    assert process.wait() == 0, process.stderr


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_every_model_is_made_measured_and_reported(whole):
    _, folder, _ = whole
    assert sorted(hashes(folder)) == ["base", "coder", "duo", "soup", "writer"]
    assert len(set(hashes(folder).values())) == 5
    assert len(scores(folder)) == 5 * 3 + 10 * 3
    page = (folder / "report.html").read_text()
    assert all(name in page for name in ("coder", "soup", "duo", "bits per byte"))
    assert not [p for p in (folder / "work").iterdir() if p.is_dir()]


def test_killed_in_training_in_tuning_and_in_measuring_it_ends_with_the_same_bytes(whole, start, tmp_path):
    recipe, expected, _ = whole
    folder = tmp_path / "killed"
    moments = {
        "in training": lambda: lines(folder / "work/base/out/log.jsonl") >= 10,
        "in tuning": lambda: lines(folder / "work/coder/out/log.jsonl") >= 5,
        "in the ensemble": lambda: (folder / "work/duo/out").is_dir(),
        "in measuring": lambda: lines(folder / "results.jsonl") >= 4,
        "in comparing": lambda: lines(folder / "results.jsonl") >= 20,
    }
    for name, moment in moments.items():
        assert start(recipe, folder).kill_when(moment), f"the run ended before it was killed {name}"
    finish(start, recipe, folder)
    assert weights(folder) == weights(expected)
    assert hashes(folder) == hashes(expected)
    assert sorted(map(str, scores(folder))) == sorted(map(str, scores(expected)))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(whole, start, tmp_path):
    recipe, expected, seconds = whole
    folder, clock = tmp_path / "killed", random.Random(1)
    for _ in range(3):
        start(recipe, folder).kill_after(clock.uniform(0.1, 0.6) * seconds)
    finish(start, recipe, folder)
    assert weights(folder) == weights(expected)
    assert sorted(map(str, scores(folder))) == sorted(map(str, scores(expected)))


def test_side_by_side_it_comes_out_the_same(whole, tmp_path):
    recipe, expected, _ = whole
    result = run(recipe, tmp_path / "beside", jobs=2, only=["coder", "writer"])
    assert sorted(result.made) == ["base", "coder", "writer"]
    made = weights(result.folder)
    assert len(made) == 3
    assert made == {name: content for name, content in weights(expected).items() if name in made}


def test_what_was_made_loads_as_an_ordinary_model_from_where_the_run_was_moved_to(whole, tmp_path):
    import shutil

    import graft

    _, folder, _ = whole
    shutil.copytree(folder, tmp_path / "moved")
    for name in ("soup", "duo"):
        assert graft.load(tmp_path / "moved" / "models" / name).can_generate()
    said = graft.chat(tmp_path / "moved" / "models" / "duo", "def ", max_tokens=5, temperature=0)
    assert said == graft.chat(folder / "models" / "duo", "def ", max_tokens=5, temperature=0)
