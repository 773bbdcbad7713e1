"""Cross entropy in nats, in fp32, summed over labels: of logits that are there, and of logits that are not.

Both go over the positions in chunks. Of deferred logits those of one chunk are there at a time, and with them its part
of the gradients, as in fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989, section 3.2): what is kept for
the backward pass are these.

Shapes: positions n, channels k, vocabulary v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graft.data.alone import IGNORED
from graft.products import product
from graft.train.deferred import Deferred, Step
from graft.train.memory import positions_at_once

CHUNK_NUMBERS = 1 << 20
"""Logits that are looked at together, so that what is made of them on the way stays small and in the cache."""


def summed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """-Σ weight · log softmax(logits [..., vocabulary])[label] over the labels [...] that are not ignored, in fp32.

    `weights [...]`: one where not given; they have no gradient. Logits that are deferred are computed for these labels
    alone, a few at a time.
    """
    targets, shares = labels.flatten(), None if weights is None else weights.flatten().float()
    if isinstance(logits, Deferred):
        if logits.whole is None:
            return _of_deferred(logits, targets, shares)
        logits = logits.whole
    flat = logits.flatten(0, -2)
    if targets.device.type == "cpu":  # elsewhere, counting the labels would make the device wait
        wanted = (targets != IGNORED).nonzero().squeeze(1)
        if len(wanted) < 0.75 * len(targets):
            flat, targets, shares = flat[wanted], targets[wanted], None if shares is None else shares[wanted]
    there = (targets != IGNORED).float()
    return _OfLogits.apply(flat, targets.clamp(min=0), there if shares is None else there * shares)


Places = slice | torch.Tensor
"""Numbers of positions."""


class _OfLogits(torch.autograd.Function):
    """Goes over the logits in chunks, forward and backward: no copy of them in fp32 is ever held."""

    @staticmethod
    def forward(ctx: Any, logits_nv: torch.Tensor, labels_n: torch.Tensor, weights_n: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logits_nv.device)
        for here in _chunks(len(logits_nv), CHUNK_NUMBERS // logits_nv.shape[-1]):
            log_probs = torch.log_softmax(logits_nv[here], -1, dtype=torch.float32)
            chosen = log_probs.gather(-1, labels_n[here][:, None]).squeeze(1)
            total -= (chosen * weights_n[here]).sum()
        ctx.save_for_backward(logits_nv, labels_n, weights_n)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_nv, labels_n, weights_n = ctx.saved_tensors
        gradient_nv = torch.empty_like(logits_nv)
        for here in _chunks(len(logits_nv), CHUNK_NUMBERS // logits_nv.shape[-1]):
            scale_n1 = (upstream[0] * weights_n[here])[:, None]
            chunk = torch.softmax(logits_nv[here], -1, dtype=torch.float32).mul_(scale_n1)
            gradient_nv[here] = chunk.scatter_add_(-1, labels_n[here][:, None], -scale_n1)
        return gradient_nv, None, None


def _of_deferred(logits: Deferred, targets_n: torch.Tensor, weights_n: torch.Tensor | None) -> torch.Tensor:
    there, places = targets_n != IGNORED, None
    if targets_n.device.type == "cpu":
        places = there.nonzero().squeeze(1)
        targets_n, weights_n = targets_n[places], None if weights_n is None else weights_n[places]
    else:
        targets_n, weights_n = targets_n.clamp(min=0), there.float() if weights_n is None else there * weights_n
    asked = _Asked(logits.steps, logits.kind, places, targets_n, weights_n)
    layer, hidden_nk = logits.layer, logits.hidden.flatten(0, -2)
    return _OfDeferred.apply(asked, torch.is_grad_enabled(), hidden_nk, layer.weight, layer.bias)


@dataclass
class _Gradients:
    """Sums of gradients, of those that are wanted: of hidden [n, k]; in fp32 of weight [v, k] and bias [v]."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def zeros(cls, tensors: Sequence[torch.Tensor | None], wanted: Sequence[bool]) -> _Gradients:
        """Those of nothing, for these tensors."""
        types = (None, torch.float32, torch.float32)
        each = zip(tensors, wanted, types, strict=True)
        return cls(*(torch.zeros_like(t, dtype=kind) if one and t is not None else None for t, one, kind in each))

    def add(self, places: Places, slope_nv: torch.Tensor, hidden_nk: torch.Tensor, weight_vk: torch.Tensor) -> None:
        """The part of these places, where the layer's output has this gradient."""
        if self.hidden is not None:
            self.hidden[places] = product(slope_nv, weight_vk).to(self.hidden.dtype)
        if self.weight is not None and slope_nv.dtype is torch.float32:
            # in place: oneDNN would need room for the product, and be no quicker
            self.weight.addmm_(slope_nv.t(), hidden_nk)
        elif self.weight is not None:
            self.weight += slope_nv.t() @ hidden_nk
        if self.bias is not None:
            self.bias += slope_nv.sum(0, dtype=torch.float32)

    def all(self) -> tuple[torch.Tensor | None, ...]:
        """In order."""
        return self.hidden, self.weight, self.bias


@dataclass(frozen=True)
class _Asked:
    """What is asked of deferred logits of type `kind`: at `places [m]` (None: at all) the labels [m], weights [m]."""

    steps: tuple[Step, ...]
    kind: torch.dtype
    places: torch.Tensor | None
    labels: torch.Tensor
    weights: torch.Tensor | None

    def answer(
        self,
        hidden_nk: torch.Tensor,
        weight_vk: torch.Tensor,
        bias_v: torch.Tensor | None,
        wanted: Sequence[bool],
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """The summed loss, and of `scale` (None: 1) times it the gradients by these that are `wanted`."""
        loss = torch.zeros((), device=hidden_nk.device)
        sums = _Gradients.zeros((hidden_nk, weight_vk, bias_v), wanted)
        weight, bias = weight_vk.to(self.kind), None if bias_v is None else bias_v.to(self.kind)
        for here in _chunks(len(self.labels), positions_at_once(len(weight), hidden_nk.device.type)):
            loss += self._go_over(here, hidden_nk, weight, bias, sums if any(wanted) else None, scale)
        return loss, sums.all()

    def _go_over(
        self,
        here: slice,
        hidden_nk: torch.Tensor,
        weight_vk: torch.Tensor,
        bias_v: torch.Tensor | None,
        sums: _Gradients | None,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss of a chunk, whose part is added to the gradients. When it is done, its logits are gone."""
        places = here if self.places is None else self.places[here]
        own = hidden_nk[places].to(self.kind)
        logits = product(own, weight_vk.t())
        if bias_v is not None:
            logits += bias_v
        if not self.steps:
            loss, slope = self._slope(logits, here, sums is not None, scale)
        else:
            with torch.set_grad_enabled(sums is not None):
                last = logits.requires_grad_(sums is not None)
                for step in self.steps:
                    last = step(last)
            loss, slope = self._slope(last.detach(), here, sums is not None, scale)
            if slope is not None:
                (slope,) = torch.autograd.grad(last, logits, slope)
        if sums is not None and slope is not None:
            sums.add(places, slope, own, weight_vk)
        return loss

    def _slope(
        self, logits_nv: torch.Tensor, here: slice, wanted: bool, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss of a chunk, and its gradient by these logits, if that is wanted."""
        labels = self.labels[here][:, None]
        log_probs = torch.log_softmax(logits_nv, -1, dtype=torch.float32)
        chosen = log_probs.gather(-1, labels)
        factor = torch.ones_like(chosen) if self.weights is None else self.weights[here][:, None]
        loss = -(chosen * factor).sum()
        if not wanted:
            return loss, None
        slope = log_probs.exp_()
        if scale is not None:
            factor = factor * scale
        if scale is not None or self.weights is not None:
            slope.mul_(factor)
        return loss, slope.scatter_add_(-1, labels, -factor).to(logits_nv.dtype)


class _OfDeferred(torch.autograd.Function):
    """Computes the gradients in the forward pass: in the backward pass logits would have to be computed once more.

    Those of fp16 are too small without the scale that comes in the backward pass, where they are then computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        asked: _Asked,
        learns: bool,
        hidden_nk: torch.Tensor,
        weight_vk: torch.Tensor,
        bias_v: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.asked, ctx.wanted = asked, ctx.needs_input_grad[2:]
        ctx.later = asked.kind is torch.float16
        now = tuple(learns and not ctx.later and one for one in ctx.wanted)
        loss, gradients = asked.answer(hidden_nk, weight_vk, bias_v, now)
        ctx.save_for_backward(*((hidden_nk, weight_vk, bias_v) if ctx.later else gradients))
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # these are numbers: derivatives of them would be zero
            raise RuntimeError(
                "expected a gradient that is not derived again (create_graph=False), found one of logits that were "
                "computed a few at a time: take `summed_cross_entropy` of the logits that the model gives"
            )
        if ctx.later:
            return None, None, *ctx.asked.answer(*ctx.saved_tensors, ctx.wanted, upstream[0])[1]
        return None, None, *(None if one is None else one.mul_(upstream[0]) for one in ctx.saved_tensors)


def _chunks(count: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, count, size))
