"""What tokens of a packed row may see: masks, and whether a model honours them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

Batch = Mapping[str, torch.Tensor]


def attention_mask(
    segments: torch.Tensor, *, causal: bool, prefix: torch.Tensor | None = None, additive: torch.dtype | None = None
) -> torch.Tensor:
    """[batch, 1, length, length], True where a query (row) may see a key (column).

    `segments [batch, length]`: tokens see each other only within one; -1 is padding, which sees itself alone. With
    `causal` no token sees later ones, except that tokens of a `prefix [batch, length] bool` see all of it. `additive`
    gives 0 and the smallest number of that dtype instead, for attention that adds its mask.
    """
    length = segments.shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    if causal:
        earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()[None]
        seen &= earlier if prefix is None else earlier | (prefix[:, :, None] & prefix[:, None, :])
    seen = (seen | torch.eye(length, dtype=torch.bool, device=segments.device))[:, None]
    if additive is None:
        return seen
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill_(~seen, torch.finfo(additive).min)


def predicts_in_place(model: Any) -> bool:
    """Whether the logits at a place are about that place (masked LM) and not about the next one."""
    return "MaskedLM" in type(model).__name__


def model_inputs(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """What the model's forward takes: ids, and for packed rows a mask of segments and positions restarted in each."""
    inputs = {"input_ids": batch["input_ids"]}
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    if "segments" not in batch:
        return inputs
    adds = getattr(model.config, "_attn_implementation", "eager") != "sdpa"
    inputs["attention_mask"] = attention_mask(
        batch["segments"],
        causal=not predicts_in_place(model),
        prefix=batch.get("prefix"),
        additive=torch.float32 if adds else None,
    )
    # models with ALiBi see distances only and take no positions
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = batch["positions"]
    return inputs


def keeps_apart(model: Any, length: int) -> bool:
    """Whether documents in one row of `length` tokens can be kept from seeing each other in this model.

    Tried on a small row: its second document must come out as it does alone. A model with windows of attention shorter
    than the row cannot be told of the documents without losing its windows, and one with a recurrent state not at all.
    """
    if _window(model.config) < length:
        return False
    ids = torch.arange(12, device=model.device)[None] % model.config.vocab_size
    segments = (torch.arange(12, device=model.device) >= 5).long()[None]
    positions = torch.cat([torch.arange(5), torch.arange(7)]).to(model.device)[None]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            packed = model(**model_inputs(model, {"input_ids": ids, "segments": segments, "positions": positions}))
            alone = model(input_ids=ids[:, 5:])
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model that cannot take such a mask says so
        return False
    finally:
        model.train(training)
    scale = float(alone.logits.abs().max()) * (1e-4 if alone.logits.dtype == torch.float32 else 0.05)
    return bool((packed.logits[:, 5:] - alone.logits).abs().max() <= scale)


def _window(config: Any) -> float:
    """Tokens that the narrowest layer sees; infinite where all layers see everything."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    local = any(word in kind for kind in kinds for word in ("sliding", "chunked", "local")) if kinds else None
    names = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")
    sizes = [getattr(config, name, None) for name in names]
    found = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(found) if found and local is not False else float("inf")
