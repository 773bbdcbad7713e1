"""Makes the golden file of the merge tests: what mergekit 0.1.5 makes of a tiny family of models.

    bench/venv_mergekit.sh
    bench/.venv-mergekit/bin/python bench/golden_merges.py

Runs in mergekit's own environment. A family of tiny Llama models (float32, seeded) goes through mergekit's whole run;
three tensors of each input and of each output are kept. The file's metadata says which versions and settings made it.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).resolve().parents[1] / "tests" / "merge" / "golden" / "mergekit-0.1.5.safetensors"
KEPT = ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight")
THREE, TWO = ["a", "b", "c"], ["a", "b"]
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.4}
CASES = {
    "linear": {"merge_method": "linear", "models": THREE},
    "linear_plain": {"merge_method": "linear", "models": THREE, "parameters": {"normalize": False}},
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": THREE,
        "parameters": {"lambda": 0.7},
    },
    "ties": {"merge_method": "ties", "base_model": "base", "models": THREE, "each": {"density": 0.3}},
    "ties_sum": {
        "merge_method": "ties",
        "base_model": "base",
        "models": THREE,
        "each": {"density": 0.3},
        "parameters": {"normalize": False, "lambda": 1.3},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": THREE,
        "each": {"density": 0.6, "gamma": 0.05},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": THREE,
        "each": {"density": 0.6, "gamma": 0.05},
    },
    "slerp": {"merge_method": "slerp", "base_model": "a", "models": TWO, "parameters": {"t": 0.3}},
    "nuslerp": {"merge_method": "nuslerp", "models": TWO},
    "nuslerp_base": {"merge_method": "nuslerp", "base_model": "base", "models": TWO},
    "nuslerp_rows": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": TWO,
        "parameters": {"nuslerp_flatten": False},
    },
    "multislerp": {"merge_method": "multislerp", "models": THREE},
    "multislerp_base": {"merge_method": "multislerp", "base_model": "base", "models": THREE},
    "karcher": {"merge_method": "karcher", "models": THREE},
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": THREE},
    "model_stock_rows": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": THREE,
        "parameters": {"filter_wise": True},
    },
    "nearswap": {"merge_method": "nearswap", "base_model": "base", "models": ["a"], "parameters": {"t": 0.005}},
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "base", "models": ["a"]},
    "sce": {"merge_method": "sce", "base_model": "base", "models": THREE, "parameters": {"select_topk": 0.4}},
    "ram": {"merge_method": "ram", "base_model": "base", "models": THREE, "parameters": {"epsilon": 0.005}},
    "ramplus_tl": {
        "merge_method": "ramplus_tl",
        "base_model": "base",
        "models": THREE,
        "parameters": {"epsilon": 0.005},
    },
    "passthrough": {"merge_method": "passthrough", "models": ["a"], "each": {"scale": 0.9}},
}
WEIGHTED = ("linear", "task_arithmetic", "ties", "breadcrumbs", "nuslerp", "multislerp")


def family(root: Path) -> dict[str, Path]:
    """Four tiny models: a base and three with small differences of different spread in each row."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    folders = {}
    for seed, name in enumerate(["base", "a", "b", "c"]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        if name != "base":
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(
                        0.02 * torch.rand(weight.shape[0], *[1] * (weight.dim() - 1)) * torch.randn_like(weight)
                    )
        model.save_pretrained(root / name)
        folders[name] = root / name
    return folders


def written(case: dict, folders: dict[str, Path]) -> dict:
    """The case as a mergekit configuration over these folders."""
    each, method = case.get("each", {}), case["merge_method"]
    weighted = method.startswith(WEIGHTED)
    models = [
        {"model": str(folders[name]), "parameters": each | ({"weight": WEIGHTS[name]} if weighted else {})}
        for name in case["models"]
    ]
    made = {"merge_method": method, "models": models, "dtype": "float32", "parameters": case.get("parameters", {})}
    if "base_model" in case:
        made["base_model"] = str(folders[case["base_model"]])
    return made


def main() -> None:
    kept, used = {}, {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folders = family(root)
        for name, folder in folders.items():
            found = load_file(folder / "model.safetensors")
            kept |= {f"input/{name}/{tensor}": found[tensor].clone() for tensor in KEPT}
        for name, case in CASES.items():
            config = MergeConfiguration.model_validate(yaml.safe_load(json.dumps(written(case, folders))))
            run_merge(config, str(root / "out" / name), MergeOptions(quiet=True))
            found = {k: v for f in (root / "out" / name).glob("*.safetensors") for k, v in load_file(f).items()}
            kept |= {f"{name}/{tensor}": found[tensor].float().clone() for tensor in KEPT}
            used[name] = case | {"weights": [WEIGHTS[m] for m in case["models"]]}
    versions = {p: importlib.metadata.version(p) for p in ("mergekit", "torch", "transformers")}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"made by": "bench/golden_merges.py", "versions": json.dumps(versions), "cases": json.dumps(used)}
    save_file(kept, OUT, metadata=metadata)
    print(f"{OUT}: {OUT.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
