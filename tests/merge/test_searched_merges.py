"""Merges led by held-out data: soups, searches, checkpoint averages and the spread over seeds, on trained models."""

import json
import shutil

import pytest
import torch
from small_family import tensors
from trained_family import LETTERS, job

from graft.errors import CannotCombine, RequestError, SettingsError
from graft.merge import VERB, greedy_soup
from graft.merge.search import evolve, golden
from graft.merge.space import Space, altered
from graft.models import load

TUNED = ["up", "down", "jump"]


def test_the_family_is_worth_merging(trained, measured):
    """Each kind of text is known best by the model that was tuned on it, and the mean of all knows all of them."""
    for kind in TUNED:
        bits = {name: measured(trained[name], f"{kind}.dev") for name in TUNED}
        assert min(bits, key=bits.get) == kind
    assert measured(trained["wild"]) > 2 * measured(trained["base"])


# soups


def test_a_uniform_soup_is_a_linear_merge_of_models_without_weights(merge):
    soup, _ = merge({"method": "uniform_soup", "models": TUNED}, "soup")
    linear, _ = merge({"method": "linear", "models": TUNED}, "linear")
    made, expected = tensors(soup), tensors(linear)
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def mean_by_hand(trained, names):
    every = [tensors(trained[name]) for name in names]
    return {name: sum(one[name].double() for one in every).div(len(every)).float() for name in every[0]}


def bits_of(weights, trained, measured, tmp_path):
    made = load(trained["base"])
    made.load_state_dict(weights, strict=False)
    place = tmp_path / "by_hand"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(trained["base"], place)
    made.save_pretrained(place)
    return measured(place)


def test_a_greedy_soup_is_the_one_made_by_hand(merge, trained, measured, tmp_path):
    names = ["wild", "down", "up", "jump"]
    out, notes = merge({"method": "greedy_soup", "models": names, "on": "all.dev"})
    alone = {name: measured(trained[name]) for name in names}
    soup, score, taken = [], float("inf"), {}
    for name in sorted(names, key=alone.__getitem__):
        found = bits_of(mean_by_hand(trained, [*soup, name]), trained, measured, tmp_path)
        taken[name] = found <= score
        if taken[name]:
            soup, score = [*soup, name], found
    decisions = notes["greedy_soup"]["decisions"]
    assert [(one["model"], one["taken"]) for one in decisions] == list(taken.items())
    assert soup == ["up", "jump", "down"]
    assert [one["alone"] for one in decisions] == pytest.approx([alone[one["model"]] for one in decisions], abs=1e-6)
    assert measured(out) == pytest.approx(score, abs=1e-5)
    assert score < min(alone.values())
    made, expected = tensors(out), mean_by_hand(trained, soup)
    for name in expected:
        torch.testing.assert_close(made[name], expected[name], rtol=1e-6, atol=1e-7)


def test_the_scores_in_the_manifest_are_those_of_the_written_soup(merge, measured):
    out, notes = merge({"method": "greedy_soup", "models": TUNED, "on": "all.dev"})
    assert measured(out) == notes["greedy_soup"]["decisions"][-1]["with"]


SOUPS = {
    "uniform_soup": {},
    "greedy_soup": {"on": "all.dev", "limit": 4},
    "learned_soup": {"on": "all.dev", "batch_size": 4, "epochs": 1},
    "rebasin": {},
}


@pytest.mark.parametrize("method", SOUPS)
def test_a_soup_of_equal_models_and_one_of_one_model_are_that_model(method, merge, trained, tmp_path):
    twin = shutil.copytree(trained["up"], tmp_path / "twin")
    # one model alone has no shares to learn: that is refused
    for names in (["up", "twin"], ["up"])[: 1 if method == "learned_soup" else 2]:
        out, _ = merge({"method": method, "models": names} | SOUPS[method], str(len(names)), more={"twin": twin})
        expected = tensors(trained["up"])
        for name, value in tensors(out).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["greedy_soup", "learned_soup"])
def test_the_order_of_the_models_of_a_soup_changes_nothing(method, merge):
    one, other = (
        tensors(merge({"method": method, "models": names} | SOUPS[method], str(place))[0])
        for place, names in enumerate((TUNED, TUNED[::-1]))
    )
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_a_model_stays_out_only_if_it_makes_the_soup_worse():
    losses = {("a", "b"): 0.5, ("a", "b", "c"): 0.50001, ("a", "b", "d"): 0.5}
    made = greedy_soup.choose(["c", "d", "b", "a"], [3.0, 4.0, 2.0, 1.0], lambda names: losses[tuple(names)])
    assert [(one.model, one.taken) for one in made] == [("a", True), ("b", True), ("c", False), ("d", True)]
    assert [one.before for one in made] == [None, 1.0, 0.5, 0.5]


def test_a_greedy_soup_by_accuracy_counts_upwards(merge, root):
    rows = [{"line": f"{LETTERS[i]}{LETTERS[(i + 1) % 8]}", "next": LETTERS[(i + 2) % 8]} for i in range(8)]
    (root / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "next.yaml").write_text(
        "name: next\ndata: {source: jsonl, test: next.jsonl, format: raw}\nprompt: '{{ line }}'\ntarget: '{{ next }}'\n"
        f"choices: {json.dumps(list(LETTERS))}\n"
    )
    settings = {"method": "greedy_soup", "models": ["down", "up", "jump"], "task": "next.yaml"}
    _, notes = merge(settings)
    found = notes["greedy_soup"]
    assert found["metric"] == "accuracy"
    assert found["decisions"][0]["model"] == "up"
    alone = [one["alone"] for one in found["decisions"]]
    assert alone == sorted(alone, reverse=True)


def test_models_that_have_seen_the_data_are_not_judged_by_it(merge, trained, root, data):
    from graft.data import open_corpus
    from graft.lineage import DataUse, Manifest, write_manifest

    seen = shutil.copytree(trained["up"], root / "seen")
    use = DataUse(name="all", split="train", fingerprint=open_corpus(data, "all", root).fingerprint)
    write_manifest(
        seen,
        Manifest(
            name="seen", verb="tune", verb_version=1, key="k", hash="h", initialisation="i", vocabulary="v",
            architecture="decoder", parameters=1, data=[use],
        ),
    )  # fmt: skip
    models = trained | {"seen": seen}
    made = job({"method": "greedy_soup", "models": ["seen", "up"], "on": "all.train"}, models, data, root, root / "x")
    with pytest.raises(CannotCombine, match=r"seen was trained on all.train"):
        VERB.run(made)


def test_a_soup_of_adapters_is_that_of_the_models_they_make(merge, root, trained, tmp_path):
    from small_adapters import adapter

    adapters = {name: adapter(trained["base"], tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    settings = {"models": list(adapters), "adapters_of": "base"}
    soup, notes = merge(settings | {"method": "greedy_soup", "on": "all.dev"}, "soup", more=adapters)
    taken = [one["model"] for one in notes["greedy_soup"]["decisions"] if one["taken"]]
    plain, _ = merge(settings | {"method": "uniform_soup", "models": taken}, "plain", more=adapters)
    assert all(torch.equal(a, b) for a, b in zip(tensors(soup).values(), tensors(plain).values(), strict=True))
    learned, notes = merge(settings | {"method": "learned_soup", "on": "all.dev"}, "learned", more=adapters)
    (shares,) = notes["learned_soup"]["shares"].values()
    weighted = settings | {"models": dict(zip(adapters, shares, strict=True))}
    plain, _ = merge(weighted | {"method": "linear"}, "weighted", more=adapters)
    for name, value in tensors(learned).items():
        torch.testing.assert_close(value, tensors(plain)[name], rtol=1e-6, atol=1e-7)


BESIDE = [{"search": {"over": {"limit": [1, 5]}, "on": "all.dev"}}, {"slices": [{"up": [0, 1]}]}]


@pytest.mark.parametrize("more", BESIDE)
def test_a_soup_that_chooses_by_itself_is_neither_searched_nor_sliced(more):
    with pytest.raises(SettingsError, match=r"expected no .* beside greedy_soup, which chooses by itself"):
        VERB.parse({"method": "greedy_soup", "models": ["up"], "on": "all.dev", **more})


# searches


def test_a_golden_section_finds_the_least_of_a_valley():
    asked = []

    def look(points):
        asked.extend(points)
        return [(x - 0.37) ** 2 for (x,) in points] if len(asked) <= 20 else []

    golden(look)
    best = min(asked[:20], key=lambda point: (point[0] - 0.37) ** 2)[0]
    # 20 evaluations narrow the range 0.618 ** 18 times
    assert abs(best - 0.37) < 2e-4


def test_cma_es_finds_the_known_optimum():
    wanted, asked = [0.2, 0.9, 0.55, 0.4], []

    def look(points):
        asked.extend(points)
        left = len(points) - max(0, len(asked) - 400)
        return [
            sum((10**i) * (x - w) ** 2 for i, (x, w) in enumerate(zip(p, wanted, strict=True)))
            for p in points[: max(left, 0)]
        ]

    evolve(look, [0.5] * 4, seed=1)
    assert asked[len(asked) - 8] == pytest.approx(wanted, abs=0.02)
    assert all(0 <= x <= 1 for point in asked for x in point)


def test_a_grid_over_the_scale_is_tried_evenly_and_the_best_is_written(merge, measured):
    settings = {"method": "task_arithmetic", "base": "base", "models": TUNED}
    over = {"over": {"scale": [0.1, 0.5]}, "by": "grid", "evaluations": 5, "on": "all.dev"}
    out, notes = merge(settings | {"search": over})
    tried = notes["search"]["tried"]
    assert [one["parameters"]["scale"] for one in tried] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    best = min(tried, key=lambda one: one["bits_per_byte"])
    assert notes["search"]["parameters"] == best["parameters"]
    plain, _ = merge(settings | best["parameters"], "plain")
    made, expected = tensors(out), tensors(plain)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert measured(out) == best["bits_per_byte"] < notes["search"]["as_written"]


def test_the_merge_as_written_stays_where_nothing_is_better(merge):
    settings = {"method": "task_arithmetic", "base": "base", "models": TUNED, "scale": 0.3}
    over = {"over": {"scale": {"values": [2.0, 5]}}, "by": "grid", "evaluations": 2, "on": "all.dev"}
    out, notes = merge(settings | {"search": over})
    assert notes["search"]["parameters"] == {}
    assert notes["search"]["best"] == notes["search"]["as_written"]
    plain, _ = merge(settings, "plain")
    assert all(torch.equal(a, b) for a, b in zip(tensors(out).values(), tensors(plain).values(), strict=True))


def test_numbers_by_layer_and_weights_are_searched_and_written_as_a_recipe_would(merge, measured):
    settings = {"method": "task_arithmetic", "base": "base", "models": ["up", "down"]}
    over = {"over": {"scale": [0, 1], "weights": [0, 1]}, "by_layer": 2, "evaluations": 16, "on": "all.dev"}
    out, notes = merge(settings | {"search": over}, seed=2)
    found = notes["search"]
    assert found["by"] == "cma_es"
    assert found["best"] <= found["as_written"]
    parameters = found["parameters"]
    assert [len(parameters["scale"]), *map(len, parameters["weights"])] == [2, 2, 2]
    weights = dict(zip(["up", "down"], parameters["weights"], strict=True))
    plain, _ = merge(settings | {"scale": parameters["scale"], "models": weights}, "plain")
    assert all(torch.equal(a, b) for a, b in zip(tensors(out).values(), tensors(plain).values(), strict=True))
    assert measured(out) == found["best"]


@pytest.mark.slow
def test_side_by_side_gives_what_one_after_the_other_does(merge):
    settings = {"method": "task_arithmetic", "base": "base", "models": TUNED}
    over = {"over": {"weights": [0, 1]}, "evaluations": 7, "on": ["up.dev", "down.dev"]}
    one, notes = merge(settings | {"search": over}, "one")
    two, beside = merge(settings | {"search": over | {"jobs": 2}}, "two")
    assert notes["search"] == beside["search"]
    assert all(torch.equal(a, b) for a, b in zip(tensors(one).values(), tensors(two).values(), strict=True))


def test_a_parameter_that_counts_is_tried_at_whole_numbers():
    settings = VERB.parse({"method": "karcher", "models": ["up", "down"]})
    assert altered(settings, {"iterations": 3.6}).iterations == 4
    assert altered(settings, {"weights": [0.25, 0.5]}).weights == [0.25, 0.5]


def test_an_evolution_begins_at_what_is_written_inside_the_ranges_and_else_in_the_middle():
    over = {"scale": [0, 2], "density": [0.5, 1], "weights": [0, 1]}
    raw = {"method": "ties", "base": "base", "models": {"up": 0.3, "down": 1}, "scale": 0.5, "density": 0.5}
    settings = VERB.parse(raw | {"search": {"over": over, "on": "all.dev"}})
    assert Space(settings, settings.search).start() == [0.25, 0.5, 0.3, 0.5]


def test_a_density_of_one_model_is_searched_beside_that_of_the_others():
    settings = VERB.parse({"method": "ties", "base": "base", "models": ["up", "down"], "density": 0.4})
    assert altered(settings, {"density.down": 0.7}).density == {"up": 0.4, "down": 0.7}


WRONG = [
    ({"over": {"scael": [0, 1]}}, "did you mean 'scale'"),
    ({"over": {"density.upp": [0.1, 1]}}, r"expected a parameter of ties \(weights, .*\), found 'density.upp'"),
    ({"over": {"scale": [1, 0]}}, r"expected \[lowest, highest\]"),
    ({"over": {"density": [0, 1]}}, "density above 0"),
    ({"over": {"scale": [0, 1], "density": [0.1, 1]}, "by": "golden"}, "one number for a golden section"),
    ({"over": {"scale": {"values": [1, 2]}}, "by": "cma_es"}, "lists go with"),
    ({"over": {"scale": [0, 1], "density": [0.1, 1]}, "by": "grid", "evaluations": 3}, "at least 4 evaluations"),
    ({"over": {"density": [0.1, 1]}, "by_layer": 2, "trim": "model"}, "one number, as it is measured over the whole"),
    ({"over": {"scale": [0, 1]}, "measure": "bits_per_bite"}, "did you mean 'bits_per_byte'"),
    ({"over": {"scale": [0, 1]}, "on": None}, "expected held-out data"),
    ({"over": {"scale": [0, 1]}, "measure": "classification", "metric": "bleu"}, r"accuracy, f1_macro\), found 'bleu'"),
    ({"over": {"scale": [0, 1]}, "measure": "perplexity", "metric": "mcc"}, r"\(perplexity\), found 'mcc'"),
]


@pytest.mark.parametrize(("search", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_search_that_cannot_be_made_is_refused_before_anything_runs(search, words):
    search = {"on": "all.dev", **search}
    trim = {"trim": search.pop("trim")} if "trim" in search else {}
    raw = {"method": "ties", "base": "base", "models": TUNED, "search": search, **trim}
    with pytest.raises(SettingsError, match=words):
        VERB.parse(raw)


def test_a_task_that_reads_a_data_set_has_it_named_so_that_the_key_knows(tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: all\nprompt: '{{ text }}'\ntarget: a\nchoices: [a, b]\n")
    asked = {"method": "greedy_soup", "models": ["a", "b"], "task": "t.yaml"}
    with pytest.raises(RequestError, match=r"reads the data set all.test: name it"):
        VERB.located(VERB.parse(asked), tmp_path)
    with pytest.raises(RequestError, match=r"t.yaml: expected a metric that is computed \(accuracy\), found 'mcc'"):
        VERB.located(VERB.parse(asked | {"on": "all.test", "metric": "mcc"}), tmp_path)
    settings = VERB.located(VERB.parse(asked | {"on": "all.test"}), tmp_path)
    before = VERB.content(settings)
    (tmp_path / "t.yaml").write_text("name: t\ndata: all\nprompt: '{{ text }}!'\ntarget: a\nchoices: [a, b]\n")
    assert VERB.content(settings) != before


def test_how_many_are_judged_at_a_time_is_no_part_of_the_key():
    raw = {"method": "ties", "base": "b", "models": ["a"], "search": {"over": {"scale": [0, 1]}, "on": "d.dev"}}
    raw2 = raw | {"search": raw["search"] | {"jobs": 4}}
    assert VERB.content(VERB.parse(raw)) == VERB.content(VERB.parse(raw2))
