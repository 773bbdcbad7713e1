"""Names and shapes of models like Llama, worked out from their configuration, without torch and transformers. Light.

A configuration is read only as far as it is understood to the last key that could matter: of every other one (another
class, packed weights, a value of an unexpected type) the model itself must be built, which also tells what is wrong.
The names are those of the files that such models have been published in, which versions of transformers must read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graft.fitting import Architecture


@dataclass(frozen=True)
class Kind:
    """What one type of model has beside, or in place of, what Llama has."""

    name: str
    attention_bias: bool | None = None
    """Whether queries, keys and values have a bias; None: it is a setting, and the output has one too."""
    mlp_bias: bool | None = False
    head_dim: bool = False
    """Whether the size of a head has a default of its own; else it follows where it is left out."""
    normed: str = ""
    """Queries and keys are normalised: by `head`, or as a `whole`."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


KINDS = {
    "llama": Kind("LlamaForCausalLM", mlp_bias=None),
    "mistral": Kind("MistralForCausalLM", attention_bias=False),
    "qwen2": Kind("Qwen2ForCausalLM", attention_bias=True),
    "qwen3": Kind("Qwen3ForCausalLM", head_dim=True, normed="head"),
    "gemma": Kind("GemmaForCausalLM", head_dim=True),
    "gemma2": Kind(
        "Gemma2ForCausalLM",
        head_dim=True,
        norms=(
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ),
    ),
    "olmo2": Kind(
        "Olmo2ForCausalLM", normed="whole",
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "granite": Kind("GraniteForCausalLM", mlp_bias=None),
}  # fmt: skip
"""By the `model_type` of the configuration."""
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
WORDS = {
    "hidden_act": ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "hidden_activation": ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "dtype": ("float32", "bfloat16", "float16"),
    "torch_dtype": ("float32", "bfloat16", "float16"),
}
"""Settings that are words, and those among which theirs must be."""
SAYS_NOTHING = ("_name_or_path", "transformers_version", "id2label", "label2id", "chunk_size_feed_forward")
LAYERS = ("full_attention", "sliding_attention")


def derived(config: Mapping[str, Any]) -> Architecture | None:
    """What `transformers` would build of a configuration; None where that has to be tried."""
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None or config.get("architectures") != [kind.name] or not _understood(config):
        return None
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size, rest = (config["head_dim"], 0) if "head_dim" in config else divmod(config["hidden_size"], heads)
    if heads % keys or rest or size % 2 or (kind.head_dim and "head_dim" not in config):
        return None
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config["tie_word_embeddings"] else {}
    return Architecture(kind.name, dict(_tensors(kind, config, heads * size, keys * size, size)), tied, "model.", False)


def _tensors(
    kind: Kind, config: Mapping[str, Any], queries: int, keys: int, head: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    tokens, width, mlp = (config[name] for name in ("vocab_size", "hidden_size", "intermediate_size"))
    said = bool(config.get("attention_bias", False))
    bias, out_bias = (said, said) if kind.attention_bias is None else (kind.attention_bias, False)
    mlp_bias = bool(config.get("mlp_bias", False)) if kind.mlp_bias is None else kind.mlp_bias
    matrices = {
        "self_attn.q_proj": (queries, width, bias), "self_attn.k_proj": (keys, width, bias),
        "self_attn.v_proj": (keys, width, bias), "self_attn.o_proj": (width, queries, out_bias),
    }  # fmt: skip
    vectors = {"head": (head, head), "whole": (queries, keys), "": ()}[kind.normed]
    feed = {"mlp.gate_proj": (mlp, width, mlp_bias), "mlp.up_proj": (mlp, width, mlp_bias)}
    yield "model.embed_tokens.weight", (tokens, width)
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        yield from _linear(layer, matrices)
        for name, size in zip(("q_norm", "k_norm"), vectors, strict=False):
            yield f"{layer}.self_attn.{name}.weight", (size,)
        yield from _linear(layer, {**feed, "mlp.down_proj": (width, mlp, mlp_bias)})
        for name in kind.norms:
            yield f"{layer}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (tokens, width)


def _linear(layer: str, parts: Mapping[str, tuple[int, int, bool]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, (rows, columns, bias) in parts.items():
        yield f"{layer}.{name}.weight", (rows, columns)
        if bias:
            yield f"{layer}.{name}.bias", (rows,)


def _understood(config: Mapping[str, Any]) -> bool:
    sizes = all(type(config.get(name)) is int and config[name] > 0 for name in SIZES)
    flags = [config.get("tie_word_embeddings"), config.get("attention_bias", False), config.get("mlp_bias", False)]
    return (
        sizes
        and all(type(flag) is bool for flag in flags)
        and type(config.get("head_dim", 1)) is int
        and all(_is_plain(key, value, config["num_hidden_layers"]) for key, value in config.items())
    )


def _is_plain(key: str, value: Any, layers: int) -> bool:
    """Whether a setting is one of those that no shape hangs on, or is read by `derived`."""
    if key in ("model_type", "architectures", *SAYS_NOTHING):
        return True
    if key in WORDS:
        return value is None or value in WORDS[key]
    if key in ("rope_parameters", "rope_scaling"):
        return value is None or _is_plain_rope(value)
    if key == "layer_types":
        return value is None or (isinstance(value, list) and len(value) == layers and set(value) <= set(LAYERS))
    if key == "eos_token_id" and isinstance(value, list):
        return all(type(one) is int for one in value)
    return value is None or isinstance(value, int | float)


def _is_plain_rope(value: Any) -> bool:
    kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else None
    numbers = isinstance(value, dict) and all(
        isinstance(one, int | float) for key, one in value.items() if key not in ("rope_type", "type")
    )
    return numbers and kind == "default"
