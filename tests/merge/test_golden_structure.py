"""Agreement with mergekit 0.1.5 on gradients, filters, slices, vocabularies; made by bench/golden_structure.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_family import merge
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft.models import load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "mergekit-0.1.5-structure.safetensors"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Both compute in float32, in another order."""
AFTER = ("model.norm.weight", "lm_head.weight")
RULES = {"*self_attn*": [0, 0.5, 1], "*mlp*": [1, 0.2], "*": 0.5}
HALVES = {"a": 0.3, "b": 0.7}
OURS = {
    "rules": {"method": "slerp", "models": ["a", "b"], "t": RULES},
    "gradients": {"method": "task_arithmetic", "base": "base", "models": {"a": [0.1, 0.9], "b": [1, 0, 0.5]}},
    "density": {
        "method": "ties",
        "base": "base",
        "models": {"a": 0.5, "b": 0.3},
        "density": {"a": {"*mlp*": 0.3, "*": 0.7}, "b": 0.6},
    },
    "slices": {
        "method": "linear",
        "models": HALVES,
        "slices": [{"a": [0, 2], "b": [0, 2]}, {"a": [1, 3], "b": [0, 2]}],
    },
    "stack": {"method": "passthrough", "slices": [{"a": [0, 2]}, {"b": [1, 3]}]},
    "union": {"method": "linear", "models": {"a": 0.4, "other": 0.6}, "vocabulary": "union"},
}


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        told = {key: json.loads(text) for key, text in file.metadata().items() if text[:1] in "{["}
    return load_file(GOLDEN), told


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    held, told = golden
    root = tmp_path_factory.mktemp("golden")
    for name, words in told["spoken"].items():
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        made = LlamaForCausalLM(config)
        made.load_state_dict({k.split("/")[2]: t for k, t in held.items() if k.startswith(f"input/{name}/")})
        made.save_pretrained(root / name)
        words_of = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        words_of.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words_of, unk_token=words[0]).save_pretrained(root / name)
    return {name: root / name for name in told["spoken"]}


def both(name, golden, folders, tmp_path):
    out, _ = merge(OURS[name], folders, tmp_path / "out")
    theirs = {k.removeprefix(f"{name}/"): t for k, t in golden[0].items() if k.startswith(f"{name}/")}
    assert out.keys() == theirs.keys()
    return out, theirs


def test_every_case_of_the_file_is_compared(golden):
    assert set(OURS) == set(golden[1]["cases"])


@pytest.mark.parametrize("name", ["rules", "density", "slices", "stack"])
def test_agrees_with_mergekit(name, golden, folders, tmp_path):
    out, theirs = both(name, golden, folders, tmp_path)
    for tensor, value in out.items():
        torch.testing.assert_close(value, theirs[tensor], **CLOSE, msg=lambda m, t=tensor: f"{t}: {m}")


def test_a_gradient_agrees_but_behind_the_layers_where_we_take_its_last_number(golden, folders, tmp_path):
    out, theirs = both("gradients", golden, folders, tmp_path)
    for tensor in out.keys() - set(AFTER):
        torch.testing.assert_close(out[tensor], theirs[tensor], **CLOSE, msg=lambda m, t=tensor: f"{t}: {m}")
    held = golden[0]
    for tensor in AFTER:
        base, a, b = (held[f"input/{name}/{tensor}"] for name in ("base", "a", "b"))
        torch.testing.assert_close(out[tensor], base + 0.9 * (a - base) + 0.5 * (b - base), **CLOSE)
        torch.testing.assert_close(theirs[tensor], base + 0.1 * (a - base) + 1.0 * (b - base), **CLOSE)


def test_a_union_of_vocabularies_agrees_row_by_row(golden, folders, tmp_path):
    """New tokens stand in another order there (that of a set), so rows are compared by token."""
    out, theirs = both("union", golden, folders, tmp_path)
    ours_at, theirs_at = load_tokenizer(tmp_path / "out").get_vocab(), golden[1]["vocabularies"]["union"]
    assert ours_at.keys() == theirs_at.keys()
    for tensor, value in out.items():
        if tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            for token in ours_at:
                torch.testing.assert_close(value[ours_at[token]], theirs[tensor][theirs_at[token]], **CLOSE)
        else:
            torch.testing.assert_close(value, theirs[tensor], **CLOSE)
