"""Which `transformers` class carries which architecture and position encoding, and how wide a model of a size is.

| architecture    | positions  | class                          |
|-----------------|------------|--------------------------------|
| decoder         | rotary     | LlamaForCausalLM               |
| decoder         | learned    | GPT2LMHeadModel                |
| decoder         | sinusoidal | XGLMForCausalLM                |
| decoder         | alibi      | MptForCausalLM                 |
| encoder         | rotary     | ModernBertForMaskedLM          |
| encoder         | learned    | BertForMaskedLM                |
| encoder-decoder | relative   | T5ForConditionalGeneration     |
| encoder-decoder | learned    | BartForConditionalGeneration   |
| encoder-decoder | sinusoidal | MarianMTModel                  |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.errors import CannotCombine, RequestError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from graft.pretrain.settings import PretrainSettings


@dataclass(frozen=True)
class Shape:
    """Everything a configuration is made from. `ids` are the tokenizer's special token ids, by name."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    dropout: float
    ids: dict[str, int]


def _llama(s: Shape) -> dict[str, Any]:
    return {
        "hidden_size": s.hidden, "intermediate_size": _gated(s.hidden), "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.heads, "max_position_embeddings": s.length,
        "attention_dropout": s.dropout, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip


def _gpt2(s: Shape) -> dict[str, Any]:
    return {
        "n_embd": s.hidden, "n_layer": s.layers, "n_head": s.heads, "n_positions": s.length, "n_inner": 4 * s.hidden,
        "resid_pdrop": s.dropout, "embd_pdrop": s.dropout, "attn_pdrop": s.dropout, "activation_function": "gelu_new",
    }  # fmt: skip


def _xglm(s: Shape) -> dict[str, Any]:
    return {
        "d_model": s.hidden, "num_layers": s.layers, "attention_heads": s.heads, "ffn_dim": 4 * s.hidden,
        "max_position_embeddings": s.length, "dropout": s.dropout, "attention_dropout": s.dropout,
    }  # fmt: skip


def _mpt(s: Shape) -> dict[str, Any]:
    return {
        "d_model": s.hidden, "n_layers": s.layers, "n_heads": s.heads, "max_seq_len": s.length, "expansion_ratio": 4,
        "resid_pdrop": s.dropout, "emb_pdrop": s.dropout,
    }  # fmt: skip


def _modernbert(s: Shape) -> dict[str, Any]:
    return {
        "hidden_size": s.hidden, "intermediate_size": _gated(s.hidden), "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "max_position_embeddings": s.length, "global_attn_every_n_layers": 1,
        "attention_dropout": s.dropout, "mlp_dropout": s.dropout, "embedding_dropout": s.dropout,
        "reference_compile": False,
    }  # fmt: skip


def _bert(s: Shape) -> dict[str, Any]:
    return {
        "hidden_size": s.hidden, "intermediate_size": 4 * s.hidden, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "max_position_embeddings": s.length,
        "hidden_dropout_prob": s.dropout, "attention_probs_dropout_prob": s.dropout,
    }  # fmt: skip


def _t5(s: Shape) -> dict[str, Any]:
    return {
        "d_model": s.hidden, "d_kv": s.hidden // s.heads, "d_ff": _gated(s.hidden), "num_layers": s.layers,
        "num_heads": s.heads, "dropout_rate": s.dropout, "feed_forward_proj": "gated-gelu", "n_positions": s.length,
        "dense_act_fn": "gelu_new",
    }  # fmt: skip


def _bart(s: Shape) -> dict[str, Any]:
    return {
        "d_model": s.hidden, "encoder_layers": s.layers, "decoder_layers": s.layers, "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads, "encoder_ffn_dim": 4 * s.hidden, "decoder_ffn_dim": 4 * s.hidden,
        "max_position_embeddings": s.length, "dropout": s.dropout, "attention_dropout": s.dropout,
    }  # fmt: skip


def _gated(hidden: int) -> int:
    """Width of a gated feed-forward layer that has as many parameters as a plain one four times as wide."""
    return -(-8 * hidden // 3 // 16) * 16


TABLE: dict[tuple[str, str], tuple[str, str, Callable[[Shape], dict[str, Any]]]] = {
    ("decoder", "rotary"): ("LlamaForCausalLM", "llama", _llama),
    ("decoder", "learned"): ("GPT2LMHeadModel", "gpt2", _gpt2),
    ("decoder", "sinusoidal"): ("XGLMForCausalLM", "xglm", _xglm),
    ("decoder", "alibi"): ("MptForCausalLM", "mpt", _mpt),
    ("encoder", "rotary"): ("ModernBertForMaskedLM", "modernbert", _modernbert),
    ("encoder", "learned"): ("BertForMaskedLM", "bert", _bert),
    ("encoder-decoder", "relative"): ("T5ForConditionalGeneration", "t5", _t5),
    ("encoder-decoder", "learned"): ("BartForConditionalGeneration", "bart", _bart),
    ("encoder-decoder", "sinusoidal"): ("MarianMTModel", "marian", _bart),
}
"""(architecture, positions) → class, `model_type`, and what makes the rest of the configuration of a shape."""
DEFAULT_POSITIONS = {"decoder": "rotary", "encoder": "rotary", "encoder-decoder": "relative"}


def positions_for(architecture: str, positions: str | None) -> str:
    """The position encoding, or the architecture's default. Raises CannotCombine where no class carries the pair."""
    chosen = positions or DEFAULT_POSITIONS[architecture]
    if (architecture, chosen) not in TABLE:
        possible = ", ".join(p for a, p in TABLE if a == architecture)
        raise CannotCombine(f"no {architecture} with {chosen} positions; for {architecture} there are: {possible}")
    return chosen


def config_for(architecture: str, positions: str, shape: Shape) -> PretrainedConfig:
    """The configuration, complete with vocabulary, special tokens and the name of its class."""
    import transformers

    name = TABLE[architecture, positions][0]
    said = planned_config(architecture, positions, shape)
    config = getattr(transformers, name).config_class(
        **{key: value for key, value in said.items() if key not in ("architectures", "model_type")}
    )
    config.architectures = [name]
    return config


def planned_config(architecture: str, positions: str, shape: Shape) -> dict[str, Any]:
    """What `config.json` will say of the model's class and sizes, with the ids of special tokens in `shape`. Light."""
    name, kind, build = TABLE[architecture, positions]
    ids = {f"{word}_token_id": shape.ids.get(word) for word in ("bos", "eos", "pad")}
    if architecture == "encoder-decoder":
        ids |= {"decoder_start_token_id": shape.ids["pad"], "forced_eos_token_id": None}
    if name == "ModernBertForMaskedLM":
        ids |= {"cls_token_id": shape.ids.get("bos"), "sep_token_id": shape.ids.get("eos")}
    return {"architectures": [name], "model_type": kind, "vocab_size": shape.vocabulary, **build(shape), **ids}


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A model with fresh weights (drawn from torch's generator), in fp32, in training mode."""
    import torch
    import transformers

    return getattr(transformers, _class_name(config))._from_config(config, dtype=torch.float32).train()


def _class_name(config: PretrainedConfig) -> str:
    assert config.architectures
    return config.architectures[0]


def count_parameters(config: PretrainedConfig) -> int:
    """Number of parameters, tied ones once; nothing is allocated."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, _class_name(config))(config)
        model.tie_weights()
        return model.num_parameters()


def default_heads(hidden: int) -> int:
    """Attention heads of about 32 channels in models narrower than 512, of about 64 in wider ones, that fill `hidden`.

    Channels of a head are even where they can be, which rotary positions need.
    """
    wanted = 32 if hidden < 512 else 64
    fitting = [heads for heads in range(1, hidden + 1) if hidden % heads == 0]
    even = [heads for heads in fitting if hidden // heads % 2 == 0] or fitting
    return min(even, key=lambda heads: abs(hidden // heads - wanted))


def dimensions(size: int, architecture: str, positions: str, vocabulary: int, length: int) -> tuple[int, int, int]:
    """(hidden, layers, heads) of the model whose number of parameters comes nearest to `size`.

    Width grows in steps of a head (32 channels, from 512 on 64) and depth follows the width (a layer for every 40
    channels, at least 2), within three layers either way; of shapes near in size the one with that ratio is taken.
    """
    best: tuple[float, tuple[int, int, int]] | None = None
    for hidden in (*range(32, 512, 32), *range(512, 4096 + 1, 64)):
        typical, heads, found = max(2, round(hidden / 40)), default_heads(hidden), 0
        for layers in range(max(1, typical - 3), typical + 4):
            found = estimate_parameters(architecture, positions, hidden, layers, heads, vocabulary, length)
            off = abs(found - size) / size + 0.003 * abs(layers - typical)
            if best is None or off < best[0]:
                best = off, (hidden, layers, heads)
        if found > 2 * size:
            break
    assert best is not None
    return best[1]


NO_SIZE = "expected `size` (such as 5M), or `hidden` and `layers`, found neither"


def shape_of(settings: PretrainSettings, vocabulary: int) -> tuple[int, int, int]:
    """(hidden, layers, heads): as the settings give them, or from their size. Raises RequestError where they do not."""
    if settings.size is not None:
        positions = positions_for(settings.architecture, settings.positions)
        return dimensions(settings.size, settings.architecture, positions, vocabulary, settings.length)
    if settings.hidden is None or settings.layers is None:
        raise RequestError(NO_SIZE)
    return settings.hidden, settings.layers, settings.heads or default_heads(settings.hidden)


def units_of(positions: str, hidden: int) -> tuple[int, bool]:
    """(units of a feed-forward block, whether it is gated) of the class that carries these positions."""
    gated = positions in ("rotary", "relative")
    return (_gated(hidden) if gated else 4 * hidden), gated


def estimate_parameters(
    architecture: str, positions: str, hidden: int, layers: int, heads: int, vocabulary: int, length: int
) -> int:
    """Number of parameters by formula: embeddings, and for each layer 4 h² of attention and 8 h² of feed-forward."""
    units, gated = units_of(positions, hidden)
    feed_forward = 3 * hidden * units if gated else 2 * hidden * units + 5 * hidden
    attention = 4 * hidden * hidden + (0 if gated or positions == "alibi" else 4 * hidden)
    blocks = layers * (attention + feed_forward + 4 * hidden)
    if architecture == "encoder-decoder":
        blocks = 2 * blocks + layers * attention
    table = vocabulary * hidden
    places = length * hidden if positions == "learned" else 0
    head = hidden * hidden if architecture == "encoder" else 0
    return blocks + table + places + head
