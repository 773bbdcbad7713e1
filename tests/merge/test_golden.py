"""Agreement with mergekit 0.1.5 on tensors that it merged; see bench/golden_merges.py for how the file was made."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from streaming import streamed

GOLDEN = Path(__file__).parent / "golden" / "mergekit-0.1.5.safetensors"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""Both compute in float32, in another order; weights are around 0.02 to 1."""
OURS = {
    "linear": {"method": "linear"},
    "linear_plain": {"method": "linear", "normalise": False},
    "task_arithmetic": {"method": "task_arithmetic", "scale": 0.7},
    "ties": {"method": "ties", "density": 0.3},
    "ties_sum": {"method": "ties", "density": 0.3, "normalise": False, "scale": 1.3},
    "breadcrumbs": {"method": "breadcrumbs", "density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"method": "breadcrumbs_ties", "density": 0.6, "gamma": 0.05},
    "slerp": {"method": "slerp", "t": 0.3},
    "nuslerp": {"method": "nuslerp"},
    "nuslerp_base": {"method": "nuslerp"},
    "nuslerp_rows": {"method": "nuslerp", "by": "row"},
    "multislerp": {"method": "multislerp"},
    "multislerp_base": {"method": "multislerp"},
    "karcher": {"method": "karcher"},
    "model_stock": {"method": "model_stock"},
    "model_stock_rows": {"method": "model_stock", "by": "row"},
    "nearswap": {"method": "nearswap", "t": 0.005},
    "arcee_fusion": {"method": "arcee_fusion"},
    "sce": {"method": "sce", "select": 0.4},
    "ram": {"method": "ram", "epsilon": 0.005},
    "ramplus_tl": {"method": "ramplus_tl", "epsilon": 0.005},
    "passthrough": {"method": "passthrough", "scale": 0.9},
}
WEIGHTED = ("linear", "task_arithmetic", "ties", "breadcrumbs", "nuslerp", "multislerp")


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
    return load_file(GOLDEN), cases


def test_every_case_of_the_file_is_compared(golden):
    assert set(OURS) == set(golden[1])


@pytest.mark.parametrize("name", sorted(OURS))
def test_agrees_with_mergekit(name, golden, tmp_path):
    tensors, cases = golden
    case = cases[name]
    settings = dict(OURS[name])
    weighted = settings["method"].startswith(WEIGHTED)
    settings["models"] = dict(zip(case["models"], case["weights"], strict=True)) if weighted else case["models"]
    if "base_model" in case and name != "slerp":
        settings["base"] = case["base_model"]
    parents = {
        m: {k.split("/")[2]: t for k, t in tensors.items() if k.startswith(f"input/{m}/")} for m in ("base", *"abc")
    }
    made = streamed(settings, parents, tmp_path)
    theirs = {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}
    assert made.keys() == theirs.keys()
    for tensor, values in made.items():
        torch.testing.assert_close(values, theirs[tensor], **TOLERANCE, msg=lambda m, t=tensor: f"{t}: {m}")
