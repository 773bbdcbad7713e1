"""Makes the third golden file of the merge tests: what mergekit 0.1.5 makes where it drops elements at random, with the
masks that it drew.

    bench/venv_mergekit.sh
    bench/.venv-mergekit/bin/python bench/golden_random.py

Runs in mergekit's own environment, on the family of golden_merges.py. Of each task vector of a kept tensor the file has
the mask that was drawn for it and the probabilities that it was drawn with: others can be made to drop the same.
"""

import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import mergekit.merge_methods.generalized_task_arithmetic as methods
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file

from golden_merges import KEPT, OUT, THREE, WEIGHTS, family

FILE = OUT.with_name("mergekit-0.1.5-random.safetensors")
CASES = {
    "dare_linear": {"merge_method": "dare_linear", "each": {"density": 0.4}},
    "dare_linear_plain": {"merge_method": "dare_linear", "each": {"density": 0.4}, "parameters": {"rescale": False}},
    "dare_linear_whole": {"merge_method": "dare_linear", "each": {"density": 1.0}},
    "dare_ties": {"merge_method": "dare_ties", "each": {"density": 0.6}},
    "dare_ties_mean": {
        "merge_method": "dare_ties",
        "each": {"density": 0.6},
        "parameters": {"normalize": True, "lambda": 0.7},
    },
    "dare_ties_whole": {"merge_method": "dare_ties", "each": {"density": 1.0}},
    "della_linear": {"merge_method": "della_linear", "each": {"density": 0.5, "epsilon": 0.2}},
    "della_linear_whole": {"merge_method": "della_linear", "each": {"density": 1.0}},
    "della": {"merge_method": "della", "each": {"density": 0.5, "epsilon": 0.2}},
    "della_sum": {
        "merge_method": "della",
        "each": {"density": 0.3, "epsilon": 0.1},
        "parameters": {"normalize": False, "rescale": False, "lambda": 1.3},
    },
    "della_whole": {"merge_method": "della", "each": {"density": 1.0}},
}

Tensors = dict[str, torch.Tensor]


@contextmanager
def watched(parents: dict[str, Tensors]) -> Iterator[Tensors]:
    """What is drawn in the meantime for task vectors of kept tensors: `mask/MODEL/TENSOR` and `share/MODEL/TENSOR`."""
    found: Tensors = {}
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    draw, sparsify = torch.bernoulli, methods.sparsify
    deltas = {(m, t): parents[m][t] - parents["base"][t] for m in THREE for t in KEPT}

    def draw_and_keep(shares: torch.Tensor) -> torch.Tensor:
        drawn.append((shares, draw(shares)))
        return drawn[-1][1]

    def sparsify_and_keep(delta: torch.Tensor, **options: object) -> torch.Tensor:
        drawn.clear()
        made = sparsify(delta, **options)
        for (model, tensor), own in deltas.items():
            if drawn and own.shape == delta.shape and torch.equal(own, delta):
                shares, mask = (one.reshape(delta.shape).clone() for one in drawn[0])
                found[f"mask/{model}/{tensor}"] = mask.bool()
                found[f"share/{model}/{tensor}"] = shares
        return made

    with patch.object(torch, "bernoulli", draw_and_keep), patch.object(methods, "sparsify", sparsify_and_keep):
        yield found


def written(case: dict, folders: dict[str, Path]) -> dict:
    """The case as a mergekit configuration over these folders."""
    models = [{"model": str(folders[m]), "parameters": case["each"] | {"weight": WEIGHTS[m]}} for m in THREE]
    return {
        "merge_method": case["merge_method"],
        "models": models,
        "base_model": str(folders["base"]),
        "dtype": "float32",
        "parameters": case.get("parameters", {}),
    }


def main() -> None:
    kept: Tensors = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folders = family(root)
        parents = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
        kept |= {f"input/{name}/{tensor}": held[tensor].clone() for name, held in parents.items() for tensor in KEPT}
        for name, case in CASES.items():
            torch.manual_seed(0)
            config = MergeConfiguration.model_validate(written(case, folders))
            with watched(parents) as drawn:
                run_merge(config, str(root / "out" / name), MergeOptions(quiet=True))
            expected = 0 if case["each"]["density"] == 1 else 2 * len(THREE) * len(KEPT)
            assert len(drawn) == expected, f"{name}: {len(drawn)} of {expected} draws found"
            kept |= {f"{name}/{key}": value for key, value in drawn.items()}
            found = {k: v for f in (root / "out" / name).glob("*.safetensors") for k, v in load_file(f).items()}
            kept |= {f"{name}/merged/{tensor}": found[tensor].float().clone() for tensor in KEPT}
    versions = {p: importlib.metadata.version(p) for p in ("mergekit", "torch", "transformers")}
    metadata = {"made by": "bench/golden_random.py", "versions": json.dumps(versions), "cases": json.dumps(CASES)}
    save_file(kept, FILE, metadata=metadata)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
