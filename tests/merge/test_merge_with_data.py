"""What holds for all methods that read data: what a stopped merge leaves, what helps, what is refused, the cost."""

import json
import shutil

import pytest
import torch
from readers import KINDS, LENGTH, ON, losses, save
from safetensors.torch import save_file
from small_family import tensors
from transformers import BertConfig, BertForMaskedLM

import graft
import graft.merge._adamerging as adamerging
import graft.merge._fisher as fisher
import graft.merge._grams as grams
import graft.merge._localizing as localizing
import graft.merge._through as through
import graft.merge.stream
from graft.errors import CannotCombine, SettingsError
from graft.merge import VERB
from graft.merge.telling import lines
from graft.train.estimate import cpu_flops
from graft.verb import Facts

READING = {
    "fisher": {"on": ON},
    "regmean": {"on": ON},
    "regmean_plus": {"on": ON},
    "adamerging": {"base": "base", "on": ON, "steps": 3, "learning_rate": 0.02},
    "localize_and_stitch": {"base": "base", "on": ON, "steps": 2, "density": 0.2},
}
STEPS = {
    "fisher": (fisher, "diagonal"),
    "regmean": (grams, "gather"),
    "regmean_plus": (through, "_behind"),
    "adamerging": (adamerging, "_learn"),
    "localize_and_stitch": (localizing, "localized"),
}


@pytest.mark.parametrize("method", READING)
def test_a_merge_that_was_stopped_goes_on_where_it_stood_and_gives_the_same_bytes(method, merged, monkeypatch):
    settings = {"method": method} | READING[method]
    module, name = STEPS[method]
    step, calls = getattr(module, name), []

    def counted(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return step(*arguments)

    whole, notes, _ = merged(settings, "whole")
    monkeypatch.setattr(module, name, counted)
    with pytest.raises(KeyboardInterrupt):
        merged(settings, "stopped")
    again = []
    monkeypatch.setattr(module, name, lambda *arguments: (again.append(arguments), step(*arguments))[1])
    made, noted, _ = merged(settings, "stopped")
    assert all(torch.equal(made[tensor], whole[tensor]) for tensor in whole)
    assert len(again) == {"regmean_plus": 4}.get(method, 1)
    assert noted == notes


@pytest.mark.parametrize("method", ["fisher", "regmean_plus", "adamerging"])
def test_what_was_measured_on_other_weights_is_not_used(method, merged, tuned, tmp_path):
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in tuned.items()}
    settings = {"method": method} | READING[method]
    merged(settings, "out", own=own)
    changed = {name: tensor * 1.1 for name, tensor in tensors(own["low"]).items()}
    save_file(changed, own["low"] / "model.safetensors", metadata={"format": "pt"})
    made, _, _ = merged(settings, "out", own=own)
    fresh, _, _ = merged(settings, "fresh", own=own)
    assert all(torch.equal(made[name], fresh[name]) for name in made)


def test_methods_that_read_data_are_better_on_it_than_the_mean_of_the_weights(merged, tuned, reading_root):
    """Three kinds of text that share no word: what each model has learned is of use to none of the others."""
    _, _, plain = merged({"method": "linear", "length": None}, "plain")
    found = {"linear": losses(plain)}
    options = {
        "adamerging": {"steps": 20, "learning_rate": 0.05},
        "localize_and_stitch": {"density": 0.1, "steps": 20, "learning_rate": 1e4, "bias": 3.0},
    }
    for method, settings in READING.items():
        _, _, out = merged({"method": method} | settings | options.get(method, {}), method)
        found[method] = losses(out)
    worse = {method: value for method, value in found.items() if method != "linear" and value >= found["linear"]}
    assert worse == {}, found


def test_models_that_are_no_causal_ones_are_refused(merged, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertForMaskedLM(BertConfig(**shape, intermediate_size=8, max_position_embeddings=32))
    own = {kind: save(bert, tmp_path / kind) for kind in KINDS}
    with pytest.raises(CannotCombine, match="low is of architecture encoder: fisher reads text with causal"):
        merged({"method": "fisher", "on": "all"}, own=own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fisher"}, "on: this key is required"),
        ({"method": "fisher", "on": None}, "expected a data set in `on`"),
        ({"method": "fisher", "on": {"a": "x"}}, "expected a data set for each of a, b, found one for a"),
        ({"method": "fisher", "on": "x", "models": {"a": 1, "b": -1}}, "expected weights above 0"),
        ({"method": "fisher", "on": "x", "labels": "drawn"}, "'data' or 'sampled'"),
        ({"method": "regmean", "on": "x", "alpha": 1.5}, "less than or equal to 1"),
        ({"method": "regmean", "on": "x", "tokens": 100, "length": 128}, "expected at least 128 tokens"),
        ({"method": "adamerging", "on": "x"}, "base: this key is required"),
        ({"method": "localize_and_stitch", "base": "c", "density": 0}, "expected a density above 0"),
        ({"method": "regmean_plus", "on": "x", "slices": [{"a": [0, 1]}]}, "expected whole models of one"),
        (
            {"method": "adamerging", "base": "c", "on": "x", "part": ["model."]},
            "adamerging runs what it merges",
        ),
        ({"method": "fisher", "on": "x", "vocabulary": "union"}, "expected models of one vocabulary"),
        ({"method": "adamerging", "base": "c", "on": "x", "models": {"a": [0, 1], "b": 1}}, "over the whole model"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        VERB.parse({"models": ["a", "b"]} | settings)


def test_it_is_said_in_python_too_and_the_manifest_names_the_data(tuned, reading_root, tmp_path):
    def run(name, texts):
        file = reading_root / f"{texts}.jsonl"
        sets = {"texts": {"source": "jsonl", "path": str(file), "splits": {"dev": 0, "test": 0}}}
        pair = [tuned["low"], tuned["high"]]
        out = graft.merge(tmp_path / name, method="fisher", models=pair, on="texts", length=LENGTH, data_sets=sets)
        return json.loads((out / "graft.json").read_text())

    manifest, other = run("made", "all"), run("other", "low")
    assert [(use["name"], use["split"]) for use in manifest["data"]] == [("texts", "train")]
    assert manifest["notes"]["mean_fisher_information"].keys() == {str(tuned["low"]), str(tuned["high"])}
    assert manifest["notes"]["verified_as"] == "LlamaForCausalLM"
    assert manifest["key"] != other["key"]
    assert manifest["data"][0]["fingerprint"] != other["data"][0]["fingerprint"]


FACTS = Facts("decoder", "i", "v", 10**9, 2 * 10**9, {"hidden_size": 2048, "num_hidden_layers": 22})


def test_what_it_costs_is_said_beforehand():
    plain = VERB.estimate(VERB.parse({"models": ["a", "b"]}), {"a": FACTS, "b": FACTS})
    read = VERB.parse({"method": "fisher", "models": ["a", "b"], "on": "x", "tokens": "1M"})
    found = VERB.estimate(read, {"a": FACTS, "b": FACTS})
    assert found.memory_bytes == plain.memory_bytes + 8 * 10**9
    # forward and backward: six operations a parameter and token
    assert found.seconds - plain.seconds == pytest.approx(6 * 1e9 * 2e6 / cpu_flops())
    by_size = {"method": "localize_and_stitch", "base": "c", "models": ["a", "b"]}
    assert VERB.estimate(VERB.parse(by_size), dict.fromkeys("abc", FACTS)).note == plain.note
    whole = VERB.parse({"method": "tsv_merge", "base": "c", "models": ["a", "b"]})
    assert VERB.estimate(whole, dict.fromkeys("abc", FACTS)).memory_bytes > plain.memory_bytes + 10 * 4 * 2048 * 8192


def test_layers_may_be_stacked_and_numbers_may_follow_layers(merged, tuned):
    stack = {"slices": [{kind: [0, 1] for kind in KINDS}, {kind: [0, 1] for kind in KINDS}]}
    for method in ("fisher", "regmean"):
        made, _, _ = merged({"method": method, "on": ON} | stack, method)
        first = {name: tensor for name, tensor in made.items() if ".layers.0." in name}
        assert all(torch.equal(made[name.replace(".0.", ".1.")], tensor) for name, tensor in first.items())
    base = tensors(tuned["base"])
    made, _, _ = merged(
        {"method": "iso_c", "base": "base", "scale": {"*.layers.0.*": 0, "*": 1}, "length": None}, "iso"
    )
    for name, tensor in made.items():
        assert torch.equal(tensor, base[name]) == (".layers.0." in name), name


def test_what_was_found_is_told_to_people():
    told = lines({"entropy_by_step": [2.0, 1.5], "share_in_region": {"a": 0.05}, "merged_by_regression": 7})
    assert told == [
        "learned λ in 2 steps: entropy 2.0000 to 1.5000 nats a token",
        "regions: a 5.00%",
        "7 tensors merged by regression, the others by their mean",
    ]


ALONE = {
    "fisher": {"on": "low"},
    "regmean": {"on": "low"},
    "regmean_plus": {"on": "low"},
    "adamerging": {"base": "base", "on": "low", "start": 1.0, "steps": 0},
    "localize_and_stitch": {"base": "base", "on": "low", "steps": 0, "density": 1.0},
}


@pytest.mark.parametrize("method", ALONE)
def test_one_model_alone_is_that_model(method, merged, tuned):
    made, _, _ = merged({"method": method, "models": ["low"]} | ALONE[method])
    for name, value in tensors(tuned["low"]).items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", READING)
def test_the_order_of_the_models_changes_nothing(method, merged):
    made = [merged({"method": method, "models": names} | READING[method], str(i))[0]
            for i, names in enumerate((["low", "middle", "high"], ["high", "low", "middle"]))]  # fmt: skip
    for name in made[0]:
        torch.testing.assert_close(made[0][name], made[1][name], rtol=1e-3, atol=2e-4)


TWICE = {name: {"models": {"low": 1, "again": 3}} for name in ("fisher", "regmean", "regmean_plus")} | {
    name: ALONE[name] | {"models": ["low", "again"]} for name in ("adamerging", "localize_and_stitch")
}
TWICE["adamerging"] |= {"start": 0.5}


@pytest.mark.parametrize("method", TWICE)
def test_a_model_merged_with_itself_is_that_model(method, merged, tuned, tmp_path):
    """Whatever text the two are measured on."""
    own = tuned | {"again": shutil.copytree(tuned["low"], tmp_path / "again")}
    on = {"low": "low.train", "again": "high.train"}
    made, _, _ = merged({"method": method} | TWICE[method] | {"on": on}, own=own)
    for name, value in tensors(tuned["low"]).items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-5)
