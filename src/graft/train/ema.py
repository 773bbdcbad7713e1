"""An exponential moving average of the weights while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """`average ← d · average + (1 - d) · weights` after every step n = 1, 2, …

    d = min(decay, (n + 1) / (n + 10)): the start of the training is forgotten soon. Only trained weights are held.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that step `step` ≥ 1 left."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], 1 - decay)

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
        for place, weight in enumerate(self.weights):
            self.average[place], weight.data = weight.data, self.average[place]
