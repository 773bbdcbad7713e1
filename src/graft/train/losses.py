"""Losses for the training loop: `weight(batch)` is what a batch counts, `loss(model, batch)` the SUM over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graft.data.alone import IGNORED
from graft.train.attention import Batch, model_inputs, predicts_in_place

CHUNK_NUMBERS = 1 << 20
"""Logits that are looked at together, so that what is made of them on the way stays small and in the cache."""


class TokenLoss:
    """Cross entropy in nats, summed over the tokens that have a label, in fp32.

    For decoders the label at t is predicted at t - 1; for encoders at t; for encoder–decoders the decoder reads the
    labels shifted right. `means`: of each row the mean over its tokens, summed over the rows.
    """

    def __init__(self, means: bool = False):
        self.means = means

    def weight(self, batch: Batch) -> int:
        """Number of label tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        """The summed loss, a scalar. `model` may be wrapped (DDP)."""
        plain = getattr(model, "module", model)
        labels, inputs = batch["labels"], model_inputs(plain, batch)
        if plain.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = shifted_right(labels, plain.config)
            return self._summed(model(**inputs, use_cache=False).logits, labels)
        if predicts_in_place(plain):
            return self._summed(model(**inputs).logits, labels)
        return self._summed(model(**inputs, use_cache=False).logits, shifted_left(labels))

    def _summed(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not self.means:
            return summed_cross_entropy(logits, labels)
        counts = (labels != IGNORED).sum(1).clamp(min=1)
        rows = zip(logits, labels, counts, strict=True)
        return torch.stack([summed_cross_entropy(own, wanted) / count for own, wanted, count in rows]).sum()


def shifted_left(labels: torch.Tensor) -> torch.Tensor:
    """labels[t + 1] at t: what a decoder predicts there. Labels are moved since logits would have to be copied."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def shifted_right(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """The decoder's inputs for these labels: the start token, then all labels but the last."""
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    moved = torch.cat([start, labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == IGNORED, config.pad_token_id or 0)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-Σ log softmax(logits [..., vocabulary])[labels [...]] over labels that are not ignored, in fp32."""
    flat, targets = logits.flatten(0, -2), labels.flatten()
    if targets.device.type == "cpu":  # elsewhere, counting the labels would make the device wait
        wanted = (targets != IGNORED).nonzero().squeeze(1)
        if len(wanted) < 0.75 * len(targets):
            flat, targets = flat[wanted], targets[wanted]
    return _SummedCrossEntropy.apply(flat, targets)


class _SummedCrossEntropy(torch.autograd.Function):
    """Goes over the logits in chunks, forward and backward: no copy of them in fp32 is ever held."""

    @staticmethod
    def forward(ctx: Any, logits_nv: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logits_nv.device)
        for here in _chunks(logits_nv):
            log_probs = torch.log_softmax(logits_nv[here], -1, dtype=torch.float32)
            chosen = log_probs.gather(-1, labels_n[here].clamp(min=0)[:, None]).squeeze(1)
            total -= (chosen * (labels_n[here] != IGNORED)).sum()
        ctx.save_for_backward(logits_nv, labels_n)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_nv, labels_n = ctx.saved_tensors
        gradient_nv = torch.empty_like(logits_nv)
        for here in _chunks(logits_nv):
            scale_n1 = (upstream[0] * (labels_n[here] != IGNORED))[:, None]
            chunk = torch.softmax(logits_nv[here], -1, dtype=torch.float32).mul_(scale_n1)
            gradient_nv[here] = chunk.scatter_add_(-1, labels_n[here].clamp(min=0)[:, None], -scale_n1)
        return gradient_nv, None


def _chunks(logits_nv: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_NUMBERS // logits_nv.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits_nv), size))
