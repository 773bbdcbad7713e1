"""The spread of a random merge over seeds."""

import itertools

import numpy as np
import pytest
from small_family import tensors

from graft.errors import SettingsError
from graft.merge import VERB
from graft.merge.seeds import apart
from graft.merge.telling import lines

SETTINGS = {"method": "dare_linear", "base": "base", "models": ["up", "down"], "density": 0.4}


def deltas(folder, base):
    made, below = tensors(folder), tensors(base)
    return np.concatenate([(made[name].double() - below[name].double()).numpy().ravel() for name in sorted(made)])


def test_the_spread_is_that_of_merges_made_one_by_one(merge, trained, measured):
    out, notes = merge(SETTINGS | {"seeds": {"count": 3, "on": "all.dev"}}, seed=4)
    found = notes["seeds"]
    single = [merge(SETTINGS, f"seed{seed}", seed=seed)[0] for seed in (4, 5, 6)]
    every = [deltas(folder, trained["base"]) for folder in single]
    norms = [float(np.linalg.norm(one)) for one in every]
    pairs = list(itertools.combinations(every, 2))
    distances = [float(np.linalg.norm(a - b)) / np.mean(norms) for a, b in pairs]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    assert found["seeds"] == [4, 5, 6]
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    assert found["distance"]["mean"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert found["distance"]["most"] == pytest.approx(max(distances), rel=1e-4)
    assert found["cosine"]["least"] == pytest.approx(min(cosines), rel=1e-4)
    assert found["scores"] == [measured(folder) for folder in single]
    assert found["deviation"] == pytest.approx(np.std(found["scores"], ddof=1))
    assert tensors(out).keys() == tensors(single[0]).keys()
    assert all((tensors(out)[n] == t).all() for n, t in tensors(single[0]).items())
    assert any("3 seeds" in line for line in lines(notes))


def test_without_a_measure_only_the_weights_are_compared(merge):
    _, notes = merge(SETTINGS | {"seeds": 2})
    assert set(notes["seeds"]) == {"seeds", "norms", "distance", "cosine"}
    assert notes["seeds"]["distance"]["mean"] > 0.5


def test_equal_merges_lie_nowhere_apart():
    found = apart(np.full((3, 3), 4.0))
    assert found["norms"] == [2.0, 2.0, 2.0]
    assert found["distance"] == {"mean": 0.0, "least": 0.0, "most": 0.0}
    assert found["cosine"]["mean"] == 1.0


def test_the_spread_of_a_method_that_draws_nothing_is_refused():
    with pytest.raises(SettingsError, match="expected a method that draws at random, found linear"):
        VERB.parse({"method": "linear", "models": ["a", "b"], "seeds": 3})
    with pytest.raises(SettingsError, match="greater than or equal to 2"):
        VERB.parse(SETTINGS | {"seeds": 1})
