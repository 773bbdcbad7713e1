"""An exponential moving average of the weights while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from graft.train.shards import like, local


class MovingAverage:
    """`average ← d · average + (1 - d) · weights` after every step n = 1, 2, …

    d = min(decay, (n + 1) / (n + 10)): the start of the training is forgotten soon. Only trained weights are held, of
    those that lie in parts the part of this process.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.average = [local(p).detach().clone() for p in self.weights]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average by the names of the weights, laid out as they are."""
        pairs = zip(self.weights, self.average, strict=True)
        return dict(zip(self.names, (like(p, part) for p, part in pairs), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that step `step` ≥ 1 left."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.average, [local(p).detach() for p in self.weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # by value: what spreads a model holds on to the memory of its parts
        for weight, average in zip(self.weights, self.average, strict=True):
            held = local(weight).detach().clone()
            local(weight).copy_(average)
            average.copy_(held)
