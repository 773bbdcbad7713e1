"""What tokens of a packed row may see: masks, and whether a model honours them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from graft.masks import attention_mask

Batch = Mapping[str, torch.Tensor]


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
