"""A whole family from one recipe: seeds, bags, checkpoints, dropout, a gate, least risk; measured and reported."""

import json

import pytest

import graft
from graft import models
from graft.data.bootstrap import weights_of
from graft.report.members import members
from graft.report.read import read_run

RECIPE = """
family: members
data:
  code: {source: python-library, keep: docstrings, packages: [json, html, email], splits: {dev: 0.2, test: 0.2}}
models:
  base: {pretrain: &small {data: code, hidden: 32, layers: 1, length: 64, batch_size: 8, budget: 6 steps, dropout: 0.1,
                           evaluate_every: 2, keep: {last: 2}, positions: learned,
                           tokenizer: {algorithm: bpe, size: 400}}}
  seed1: {pretrain: {<<: *small, tokenizer: {of: base}}, seed: 1}
  bag1: {pretrain: {<<: *small, tokenizer: {of: base}, bootstrap: 1}}
  bag2: {pretrain: {<<: *small, tokenizer: {of: base}, bootstrap: 2}}
  seeds: {ensemble: {members: [base, seed1]}}
  bags: {ensemble: {members: [bag1, bag2], show: code.test}}
  steps: {ensemble: {members: [{model: base, checkpoints: last 2}]}}
  dropped: {ensemble: {members: [{model: base, dropout: {passes: 3}}]}}
  gated: {ensemble: {members: [base, seed1, bag1],
                     weights: {fit: code.dev, documents: 4, gate: {looks_at: [base], skip: 0.01}}}}
  careful: {ensemble: {combine: {least_risk: {candidates: 2, utility: token_f1}}, members: [base, seed1]}}
evaluate:
- {measure: bits_per_byte, on: [code.test], limit: 3}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    (root / "family.yaml").write_text(RECIPE)
    return graft.run(root / "family.yaml", root / "run")


def manifest(done, name):
    return json.loads((done.folder / "models" / name / "graft.json").read_text())


def test_every_way_to_members_is_made_and_measured(done):
    assert set(done.made) == {
        "base", "seed1", "bag1", "bag2", "seeds", "bags", "steps", "dropped", "gated", "careful"
    }  # fmt: skip
    measured = {row["model"] for row in done.rows if row["kind"] == "score"}
    assert measured == set(done.made)
    assert manifest(done, "steps")["metrics"]["weights"] == {"base-step-4": 0.5, "base-step-6": 0.5}
    assert len(manifest(done, "dropped")["metrics"]["weights"]) == 3
    assert manifest(done, "gated")["metrics"]["needed"]["base"] <= 1


def test_bags_say_how_often_each_document_was_drawn(done):
    parts = [manifest(done, name)["notes"]["bootstrap"]["parts"]["code"] for name in ("bag1", "bag2")]
    times = [weights_of(part["weights"]) for part in parts]
    assert all(each.sum() == part["documents"] for each, part in zip(times, parts, strict=True))
    assert (times[0] != times[1]).any()


def test_the_report_shows_who_speaks(done):
    page = done.report.read_text()
    assert "Who speaks" in page
    assert "bags on code.test" in page
    assert "gated on code.dev" in page
    assert "<script" not in page


def test_the_report_says_what_members_contribute(done):
    page = done.report.read_text()
    section = page[page.index("What members contribute") : page.index("Who speaks")]
    (found,) = members(read_run(done.folder))
    assert found.model == "gated"
    assert found.said in section
    metrics = manifest(done, "gated")["metrics"]
    for row in found.rows:
        part = metrics["contributions"][row[0]]
        assert row[3] == f"{part['left_out']:+.4f} ({part['low']:+.4f} to {part['high']:+.4f})"
        assert row[5] == f"{metrics['needed'][row[0]]:.0%}"
        assert all(f">{cell}<" in section for cell in row)


def test_the_ensembles_write(done):
    for name in ("dropped", "gated", "careful"):
        folder = done.folder / "models" / name
        tokenizer = models.load_tokenizer(folder)
        ids = tokenizer("def ", return_tensors="pt")["input_ids"]
        assert models.load(folder).generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
