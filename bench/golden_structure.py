"""Makes the second golden file of the merge tests: mergekit 0.1.5 on gradients, filters, slices and vocabularies.

    bench/venv_mergekit.sh
    bench/.venv-mergekit/bin/python bench/golden_structure.py

Runs in mergekit's own environment. A family of tiny Llama models of three layers (float32, seeded) goes through
mergekit's whole run; all tensors of each input and output are kept, and the vocabulary of the merged tokenizer.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parents[1] / "tests" / "merge" / "golden" / "mergekit-0.1.5-structure.safetensors"
WORDS = [f"w{i}" for i in range(12)]
SPOKEN = {"base": WORDS, "a": WORDS, "b": WORDS, "other": [*WORDS[:2], *WORDS[:1:-1][:7], "x", "y", "z"]}
"""Tokens of each model in the order of their ids; `other` lacks some of the base's and has some of its own."""
RULES = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]


def of(name: str, **parameters: object) -> dict:
    return {"model": name, "parameters": parameters}


def cut(name: str, first: int, after: int, **parameters: object) -> dict:
    return {"model": name, "layer_range": [first, after], "parameters": parameters}


CASES = {
    "rules": {
        "merge_method": "slerp", "base_model": "a", "models": [of("a"), of("b")], "parameters": {"t": RULES},
    },
    "gradients": {
        "merge_method": "task_arithmetic", "base_model": "base",
        "models": [of("a", weight=[0.1, 0.9]), of("b", weight=[1, 0, 0.5])],
    },
    "density": {
        "merge_method": "ties", "base_model": "base",
        "models": [
            of("a", weight=0.5, density=[{"filter": "mlp", "value": 0.3}, {"value": 0.7}]),
            of("b", weight=0.3, density=0.6),
        ],
    },
    "slices": {
        "merge_method": "linear",
        "slices": [
            {"sources": [cut("a", 0, 2, weight=0.3), cut("b", 0, 2, weight=0.7)]},
            {"sources": [cut("a", 1, 3, weight=0.3), cut("b", 0, 2, weight=0.7)]},
        ],
    },
    "stack": {
        "merge_method": "passthrough",
        "slices": [{"sources": [cut("a", 0, 2)]}, {"sources": [cut("b", 1, 3)]}],
    },
    "union": {
        "merge_method": "linear", "models": [of("a", weight=0.4), of("other", weight=0.6)],
        "tokenizer": {"source": "union"},
    },
}  # fmt: skip


def family(root: Path) -> dict[str, Path]:
    """Four models near one another, each with its tokenizer."""
    folders = {}
    for seed, (name, words) in enumerate(SPOKEN.items()):
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        model.save_pretrained(root / name)
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[0]).save_pretrained(root / name)
        folders[name] = root / name
    return folders


def placed(value: object, folders: dict[str, Path]) -> object:
    """A case with the folders of its models."""
    if isinstance(value, dict):
        return {k: str(folders[v]) if k in ("model", "base_model") else placed(v, folders) for k, v in value.items()}
    return [placed(one, folders) for one in value] if isinstance(value, list) else value


def main() -> None:
    kept: dict[str, torch.Tensor] = {}
    vocabularies = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folders = family(root)
        for name, folder in folders.items():
            kept |= {f"input/{name}/{tensor}": t for tensor, t in load_file(folder / "model.safetensors").items()}
        for name, case in CASES.items():
            config = MergeConfiguration.model_validate({"dtype": "float32", **placed(case, folders)})
            run_merge(config, str(root / "out" / name), MergeOptions(quiet=True))
            found = {k: v for f in (root / "out" / name).glob("*.safetensors") for k, v in load_file(f).items()}
            kept |= {f"{name}/{tensor}": values.float().clone() for tensor, values in found.items()}
            vocabularies[name] = PreTrainedTokenizerFast.from_pretrained(root / "out" / name).get_vocab()
    versions = {p: importlib.metadata.version(p) for p in ("mergekit", "torch", "transformers")}
    metadata = {
        "made by": "bench/golden_structure.py", "versions": json.dumps(versions), "cases": json.dumps(CASES),
        "spoken": json.dumps(SPOKEN), "vocabularies": json.dumps(vocabularies),
    }  # fmt: skip
    save_file({name: values.contiguous() for name, values in kept.items()}, OUT, metadata=metadata)
    print(f"{OUT}: {OUT.stat().st_size} bytes, {versions}, {vocabularies['union']}")


if __name__ == "__main__":
    main()
