"""Losses for the training loop: `weight(batch)` is what a batch counts, `loss(model, batch)` the SUM over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from graft.data.objectives import IGNORED

Batch = Mapping[str, torch.Tensor]


def attention_mask(
    segments: torch.Tensor, *, causal: bool, prefix: torch.Tensor | None = None, additive: torch.dtype | None = None
) -> torch.Tensor:
    """[batch, 1, length, length], True where a query (row) may see a key (column).

    `segments [batch, length]`: tokens see each other only within one; -1 is padding, which sees itself alone. With
    `causal` no token sees later ones, except that tokens of a `prefix [batch, length] bool` see all of it. `additive`
    gives 0 and the smallest number of that dtype instead, for attention that adds its mask.
    """
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    if causal:
        earlier = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
        both = earlier[None] if prefix is None else earlier[None] | (prefix[:, :, None] & prefix[:, None, :])
        seen = seen & both
    seen = seen | torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    seen = seen[:, None]
    if additive is None:
        return seen
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill(~seen, torch.finfo(additive).min)


def model_inputs(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """What the model's forward takes: ids, and for packed rows a mask of segments and restarted positions."""
    plain = getattr(model, "module", model)
    inputs = {"input_ids": batch["input_ids"]}
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    if "segments" not in batch:
        return inputs
    config = plain.config
    causal = "MaskedLM" not in type(plain).__name__
    adds = getattr(config, "_attn_implementation", "eager") != "sdpa"
    inputs["attention_mask"] = attention_mask(
        batch["segments"], causal=causal, prefix=batch.get("prefix"), additive=torch.float32 if adds else None
    )
    if takes_positions(plain):
        inputs["position_ids"] = batch["positions"]
    return inputs


def takes_positions(model: Any) -> bool:
    """Whether the model's forward takes `position_ids`; ALiBi models see distances only and need none."""
    import inspect

    return "position_ids" in inspect.signature(type(model).forward).parameters


class TokenLoss:
    """Cross entropy in nats, summed over the tokens that have a label, in fp32.

    For decoders the label at t is predicted at t - 1; for encoders at t; for encoder–decoders the decoder reads the
    labels shifted right.
    """

    def weight(self, batch: Batch) -> int:
        """Number of label tokens."""
        return int((self._labels(batch) != IGNORED).sum())

    def _labels(self, batch: Batch) -> torch.Tensor:
        return batch["labels"]

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        """The summed loss, a scalar."""
        plain = getattr(model, "module", model)
        labels = batch["labels"]
        inputs = model_inputs(model, batch)
        if plain.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = shifted_right(labels, plain.config)
            logits = model(**inputs, use_cache=False).logits
        elif "MaskedLM" in type(plain).__name__:
            logits = model(**inputs).logits
        else:
            logits, labels = model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:]
        return summed_cross_entropy(logits, labels)


def shifted_right(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """The decoder's inputs for these labels: the start token, then all labels but the last."""
    start = config.decoder_start_token_id
    moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == IGNORED, config.pad_token_id or 0)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-Σ log softmax(logits [..., vocabulary])[labels [...]] over labels that are not ignored, in fp32."""
    wanted = labels.reshape(-1) != IGNORED
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if not bool(wanted.all()) and int(wanted.sum()) < 0.75 * len(targets):
        flat, targets = flat[wanted], targets[wanted]
    return F.cross_entropy(flat.float(), targets, ignore_index=IGNORED, reduction="sum")
