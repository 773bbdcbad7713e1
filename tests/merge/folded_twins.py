"""What every method makes of adapters beside what it makes of the models that they fold into."""

import torch
from small_family import merge

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums of r products in another order."""
SUBSPACES = {"rtol": 1e-3, "atol": 2e-5}
"""Singular vectors of matrices that differ by so much."""
METHODS = {
    "linear": {"models": {"x": 1, "y": 3}},
    "task_arithmetic": {"base": "base", "models": {"x": 0.7, "y": -0.4}},
    "ties": {"base": "base", "models": ["x", "y"], "density": 0.4},
    "dare_ties": {"base": "base", "models": ["x", "y"]},
    "della_linear": {"base": "base", "models": ["x", "y"]},
    "model_stock": {"base": "base", "models": ["x", "y"]},
    "karcher": {"models": ["x", "y"]},
    "slerp": {"models": ["x", "y"]},
    "sce": {"base": "base", "models": ["x", "y"], "select": 0.5},
    "arcee_fusion": {"base": "base", "models": ["x"]},
    "ram": {"base": "base", "models": ["x", "y"]},
    "knots": {"base": "base", "models": ["x", "y"], "merge": "linear"},
    "tsv_merge": {"base": "base", "models": ["x", "y"]},
}
"""Settings of a merge of the adapters `x` and `y`."""


def check_as_folded(name, folders, tmp_path):
    """Merge `x` and `y` of `folders`, then the models in `x folded` and `y folded`; returns where the first lies."""
    settings = {"method": name} | METHODS[name]
    out, found = merge(settings, folders, tmp_path / "out")
    wanted, _ = merge(settings, folders | {n: folders[f"{n} folded"] for n in "xy"}, tmp_path / "wanted")
    close = SUBSPACES if name in ("knots", "tsv_merge") else CLOSE
    wrong = sum((~torch.isclose(out[n], wanted[n], **close)).sum() for n in out)
    # a threshold that two roundings of one value straddle may keep another element
    assert wrong <= (2 if name in ("ties", "sce", "arcee_fusion") else 0)
    assert found["notes"]["verified_as"] == "LlamaForCausalLM"
    return tmp_path / "out"
