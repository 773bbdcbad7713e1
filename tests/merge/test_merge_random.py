"""Methods that draw at random against their twins, with the same draws; and properties that are one method's own."""

import hashlib

import numpy as np
import pytest
import torch
import twins
from streaming import relatives, streamed

from graft.merge import _random
from graft.merge._random import uniform
from graft.merge.engine import short_names

W = {"a": 0.5, "b": 0.3, "c": 0.4}
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
"""float32 arithmetic in the engine against float64 in the twins."""
SEED = 11


pytestmark = pytest.mark.usefixtures("many_pieces")


def sparse(method, parents, name, density, rescale):
    """Each task vector, whole and in float64, with what the seed's own numbers leave of it."""
    made = []
    for model in W:
        # as the engine has it: a difference of float32 numbers
        delta = (parents[model][name] - parents["base"][name]).double().numpy()
        draws = uniform(SEED, name, model, 0, delta.size).reshape(delta.shape)
        if method.startswith("dare"):
            made.append(twins.dare(delta, draws, density, rescale))
        else:
            made.append(twins.della(delta, draws, density, 0.2, rescale))
    return made


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_a_random_method_is_its_formula(method, rescale, tmp_path):
    parents = relatives(3, shape=(9, 11))
    more = {"epsilon": 0.2} if "della" in method else {}
    settings = {"method": method, "base": "base", "models": W, "density": 0.4, "scale": 0.7, "rescale": rescale} | more
    made = streamed(settings, parents, tmp_path, seed=SEED)
    for name in ("w", "v"):
        thin = sparse(method, parents, name, 0.4, rescale)
        if method.endswith("linear"):
            mixed = twins.add(thin, W.values(), False)
        else:
            mixed = twins.elect(thin, W.values(), method == "della")
        expected = parents["base"][name].double().numpy() + 0.7 * mixed
        np.testing.assert_allclose(made[name].double().numpy(), expected, **CLOSE, err_msg=name)


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_the_ends_of_a_great_circle_are_the_models_and_it_runs_both_ways(method, tmp_path):
    parents = relatives(2, step=1.0)

    def between(first, second, t):
        models = {first: 1 - t, second: t} if method == "nuslerp" else [first, second]
        more = {} if method == "nuslerp" else {"t": t}
        return streamed({"method": method, "models": models} | more, parents, tmp_path)["w"]

    torch.testing.assert_close(between("a", "b", 0.0), parents["a"]["w"], rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(between("a", "b", 1.0), parents["b"]["w"], rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(between("a", "b", 0.3), between("b", "a", 0.7), rtol=2e-6, atol=5e-7)


def test_ties_that_trims_nothing_of_one_sign_is_the_weighted_mean_of_task_vectors(tmp_path):
    parents = relatives(1)
    grown = {name: value + (parents["a"][name] - value) * 2 for name, value in parents["base"].items()}
    settings = {"base": "base", "models": ["a", "b"], "normalise": True}
    both = parents | {"b": grown}
    made = streamed({"method": "ties", "density": 1.0} | settings, both, tmp_path)
    plain = streamed({"method": "task_arithmetic"} | settings, both, tmp_path)
    assert made.keys() == plain.keys() == {"w", "v"}
    for name in made:
        torch.testing.assert_close(made[name], plain[name], rtol=2e-6, atol=5e-7)


def test_philox_gives_its_published_numbers():
    # the known answer of Random123 for philox4x32-10 with counter and key zero
    found = _random.philox(np.zeros(1, np.uint64), np.zeros(2, np.uint32))[:, 0]
    assert [f"{word:08x}" for word in found] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize(("start", "count"), [(0, 8), (3, 100), (63, 1), (1000, 4097)])
def test_draws_are_the_words_of_the_generator(start, count):
    key = np.frombuffer(hashlib.sha256(b"5\0tensor\0model").digest()[:8], dtype=np.uint32)
    drawn = uniform(5, "tensor", "model", start, count)
    for place in range(count):
        group, inside = divmod(start + place, 64)
        word, lane = divmod(inside, 16)
        assert drawn[place] == _random.philox(np.array([16 * group + lane], np.uint64), key)[word, 0]


@pytest.mark.parametrize("method", ["dare_linear", "della", "knots"])
def test_what_is_drawn_belongs_to_a_name_in_whatever_folder_and_order(method, tmp_path):
    from small_adapters import adapter
    from small_family import family, merge

    found = family(tmp_path / "family", 2)
    if method == "knots":
        found |= {name: adapter(found["base"], tmp_path / f"adapter {name}", seed) for seed, name in enumerate("ab")}
    again = {"base": found["base"], "some/b": found["b"], "/some/a": found["a"]}
    more = {"merge": "dare_linear"} if method == "knots" else {}
    how = {"method": method, "base": "base", "density": 0.5} | more
    one, _ = merge(how | {"models": ["a", "b"]}, found, tmp_path / "one")
    other, _ = merge(how | {"models": ["some/b", "/some/a"]}, again, tmp_path / "other")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_models_of_one_name_in_two_folders_are_drawn_for_apart():
    assert short_names(["x/a", "y/a", "b"]) == {"x/a": "x/a", "y/a": "y/a", "b": "b"}
    assert short_names(["x/a", "y/b"]) == {"x/a": "a", "y/b": "b"}
