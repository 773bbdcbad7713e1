"""What a model can read: how many tokens, how far each layer looks back, whether texts may branch in its cache."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from graft.folders import CONTEXTS

WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")
"""Names that configurations give to how far a layer looks back."""
UNLIMITED = 10**9
"""Tokenizers that set no limit give a larger number than this."""


def longest_context(config: Any, most: int = 2048) -> int:
    """Tokens a model can read, `most` at most."""
    return min([most, *_lengths(config)])


def most_tokens(config: Any, tokenizer: Any) -> int:
    """All the tokens that a model can read; where its configuration does not say, as its tokenizer says, else 2048."""
    said = getattr(tokenizer, "model_max_length", None) or UNLIMITED
    return min(_lengths(config), default=2048 if said >= UNLIMITED else int(said))


def named_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a plain configuration names for all that the model can read; None where it names none."""
    return min(_lengths(SimpleNamespace(**config)), default=None)


def _lengths(config: Any) -> list[int]:
    text = getattr(config, "text_config", None) or config  # of a model that reads images too
    text = SimpleNamespace(**text) if isinstance(text, Mapping) else text
    found = [getattr(text, name, None) for name in CONTEXTS]
    return [size for size in found if isinstance(size, int) and size > 0]


def puts_start(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its start token before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def can_branch(model: Any) -> bool:
    """Whether what a model keeps of a text is keys and values: a recurrent state runs from one branch into the next."""
    from transformers import DynamicCache

    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return False
    return all(hasattr(layer, "keys") for layer in DynamicCache(config=model.config).layers)


def least_window(config: Any) -> int | None:
    """Tokens that the narrowest layer attends to, members of an ensemble included; None: all there are.

    A mask from outside would widen such a window, or count it in nodes of a row instead of positions.
    """
    plain = config if isinstance(config, dict) else config.to_dict()
    kinds = plain.get("layer_types")
    local = not kinds or any("sliding" in kind or "chunked" in kind for kind in kinds)
    found = [plain.get(name) for name in WINDOWS if local]
    found += [least_window(entry["config"]) for entry in plain.get("members") or () if isinstance(entry, dict)]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)
