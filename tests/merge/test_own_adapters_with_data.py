"""Methods that run models or judge merges take graft's own adapters as they take the models that they fold into."""

import json

import pytest
import torch
from own_adapters import named, own, save_folded
from small_family import tensors
from trained_family import tokenizer

from graft.lora import read_lora


@pytest.fixture(scope="module")
def parents(trained, tmp_path_factory):
    """`x` and `y` as adapters on the trained base, and folded."""
    root = tmp_path_factory.mktemp("adapters")
    made = {"x": [named("lora", rank=2)], "y": [named("lora", rank=3, pissa=True), named("ia3")]}
    folders = {name: own(trained["base"], root / name, *points, seed=ord(name)) for name, points in made.items()}
    apart = folders | {
        f"{name} folded": save_folded(folder, root / f"{name}-folded") for name, folder in folders.items()
    }
    for folder in apart.values():
        tokenizer().save_pretrained(folder)
    return apart


READING = {"on": "all.dev", "tokens": 200, "length": 24}
METHODS = {
    "fisher": READING,
    "regmean": READING,
    "regmean_plus": READING,
    "adamerging": {**READING, "base": "base", "steps": 2, "batch_size": 2},
    "localize_and_stitch": {**READING, "base": "base", "steps": 2, "density": 0.3},
    "learned_soup": {"on": "all.dev", "epochs": 1, "rows": 8},
    "greedy_soup": {"on": "all.dev", "limit": 4},
    "task_arithmetic": {"base": "base", "search": {"over": {"scale": [0.1, 1]}, "on": "all.dev", "evaluations": 4}},
}


@pytest.mark.parametrize("method", METHODS)
def test_what_runs_or_judges_models_runs_and_judges_what_adapters_make(method, merge, parents):
    settings = {"method": method, "models": ["x", "y"]} | METHODS[method]
    out, notes = merge(settings, "apart", more=parents)
    folded = {name: parents[f"{name} folded"] for name in "xy"}
    wanted, expected = merge(settings, "folded", more=folded)
    found, twins = tensors(out), tensors(wanted)
    same = torch.cat([torch.isclose(found[n], twin, rtol=1e-3, atol=2e-5).flatten() for n, twin in twins.items()])
    # a region's edge lies between two roundings of one value
    assert same.float().mean() >= (0.99 if method == "localize_and_stitch" else 1)
    # folded models have no manifests: their weights are compared
    assert notes.keys() == expected.keys() - {"correlation_of_weights"}


def test_an_adapter_out_of_an_adapter_and_a_model(merge, parents):
    out, _ = merge({"method": "extract_lora", "base": "base", "models": ["x"], "energy": 0.9999}, "thin", more=parents)
    assert {len(read_lora(out).changes)} == {14}
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
