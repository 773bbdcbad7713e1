"""What a method measures before it merges is measured once for a search, and anew for what it depends on."""

import pytest
import torch
from small_family import tensors
from trained_family import job

import graft.merge._fisher as fisher
import graft.merge._grams as grams
import graft.merge._localizing as localizing
import graft.merge._through as through
from graft.merge import VERB
from graft.merge._kept import kept
from graft.merge.matching import Matching

TWO = ["up", "down"]
READ = {"on": "all.dev", "tokens": 400, "length": 24}
CASES = {
    "fisher": ({"models": TWO, **READ}, {"floor": [1e-6, 0.5]}, (fisher, "diagonal"), 2),
    "fisher-weights": ({"method": "fisher", "models": TWO, **READ}, {"weights": [0.1, 1]}, (fisher, "diagonal"), 2),
    "regmean": ({"models": TWO, **READ}, {"alpha": [0, 0.95]}, (grams, "gather"), 2),
    "regmean-weights": ({"method": "regmean", "models": TWO, **READ}, {"weights": [0.2, 1]}, (grams, "gather"), 2),
    "localize_and_stitch": (
        {"base": "base", "models": TWO, "steps": 1, **READ},
        {"scale": [0.5, 1.5]},
        (localizing, "localized"),
        2,
    ),
    "rebasin": ({"models": TWO}, {"weights": [0.2, 1]}, (Matching, "search"), 1),
    # α changes what the layers behind the first are given: two layers and two models, for four values
    "regmean_plus": ({"models": TWO, **READ}, {"alpha": [0, 0.9]}, (through, "_behind"), 2 * 2 * 4),
}


def counted(monkeypatch, place):
    held, name = place
    real, calls = getattr(held, name), []
    monkeypatch.setattr(held, name, lambda *a, **k: (calls.append(name), real(*a, **k))[1])
    return calls


@pytest.mark.parametrize("case", CASES)
def test_a_search_measures_once_what_its_candidates_share(case, merge, monkeypatch):
    settings, over, place, expected = CASES[case]
    settings = {"method": case} | settings
    calls = counted(monkeypatch, place)
    grid = 4 if "weights" in over else 3
    _, notes = merge(settings | {"search": {"over": over, "by": "grid", "evaluations": grid, "on": "all.dev"}})
    assert len(notes["search"]["tried"]) == grid
    assert len(calls) == expected


@pytest.mark.parametrize(
    ("settings", "key", "values"),
    [
        ({"method": "fisher", "models": TWO, **READ}, "labels", ["data", "sampled"]),
        ({"method": "fisher", "models": TWO, **READ}, "tokens", [100, 400]),
        ({"method": "regmean", "models": TWO, **READ}, "length", [12, 24]),
        ({"method": "regmean_plus", "models": TWO, **READ}, "alpha", [0.1, 0.9]),
        ({"method": "localize_and_stitch", "base": "base", "models": TWO, **READ}, "density", [0.1, 0.6]),
        ({"method": "adamerging", "base": "base", "models": TWO, "steps": 2, **READ}, "start", [0.1, 0.6]),
        ({"method": "adamerging", "base": "base", "steps": 2, **READ}, "models", [{"up": 1, "down": 1}, {"up": 2}]),
    ],
)
def test_what_a_measurement_depends_on_is_measured_anew(settings, key, values, merge):
    """In one scratch folder, one after the other, as candidates of a search are made."""
    more = {"steps": 1, "learning_rate": 1.0} if settings["method"] == "localize_and_stitch" else {}
    first, second = ({**settings, **more, key: value} for value in values)
    merge(first, "shared")
    changed, _ = merge(second, "shared")
    fresh, _ = merge(second, "fresh")
    found, expected = tensors(changed), tensors(fresh)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_processes_side_by_side_use_what_was_measured_before_them(root, data, trained, tmp_path):
    search = {"over": {"floor": [1e-6, 0.5]}, "by": "grid", "evaluations": 2, "on": "all.dev", "jobs": 2}
    made = job({"method": "fisher", "models": TWO, **READ, "search": search}, trained, data, root, tmp_path / "out")
    VERB.run(made)
    assert len(list(made.scratch.glob("fisher/*"))) == 2
    assert not list(made.scratch.glob("seat-*/*"))


def test_a_measurement_is_found_in_the_scratch_of_the_search_and_only_under_what_made_it(root, data, trained, tmp_path):
    from dataclasses import replace

    whole = job({"method": "linear", "models": TWO}, trained, data, root, tmp_path / "out")
    candidate = replace(whole, scratch=whole.scratch / "seat")
    first = kept(whole, "x/0", {"a": 1}, lambda folder: (folder / "v").write_text("1"))
    assert kept(candidate, "x/0", {"a": 1}, lambda _: pytest.fail("measured again")) == first
    other = kept(candidate, "x/0", {"a": 2}, lambda folder: (folder / "v").write_text("2"))
    assert (first / "v").read_text() == "1"
    assert (other / "v").read_text() == "2"
