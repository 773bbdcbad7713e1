"""Losses for the training loop: `weight(batch)` is what a batch counts, `loss(model, batch)` the SUM over it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from graft.data.alone import IGNORED
from graft.train.attention import Batch, model_inputs, predicts_in_place
from graft.train.cross_entropy import summed_cross_entropy
from graft.train.deferred import loss_of_logits


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
        """The summed loss, a scalar. `model` may be wrapped (DDP). Logits are there for a few labels at a time, if the
        model's output layer makes them and is a plain one."""
        plain = getattr(model, "module", model)
        labels = batch["labels"]
        inputs: dict[str, Any] = {**model_inputs(plain, batch)}
        if predicts_in_place(plain):
            return loss_of_logits(model, inputs, partial(self._summed, labels))
        inputs["use_cache"] = False
        if plain.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = shifted_right(labels, plain.config)
            return loss_of_logits(model, inputs, partial(self._summed, labels))
        return loss_of_logits(model, inputs, partial(self._summed, shifted_left(labels)))

    def _summed(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not self.means:
            return summed_cross_entropy(logits, labels)
        counts = (labels != IGNORED).sum(1, keepdim=True).clamp(min=1)
        return summed_cross_entropy(logits, labels, counts.reciprocal().expand_as(labels))


def shifted_left(labels: torch.Tensor) -> torch.Tensor:
    """labels[t + 1] at t: what a decoder predicts there. Labels are moved since logits would have to be copied."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def shifted_right(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """The decoder's inputs for these labels: the start token, then all labels but the last."""
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    moved = torch.cat([start, labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == IGNORED, config.pad_token_id or 0)
