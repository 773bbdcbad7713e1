"""What goes along with a training inside the model: a module of it that adds to the loss and acts after every step."""

from __future__ import annotations

import torch
from torch import nn


class Companion(nn.Module):
    """A part of a model that has a say in its training; what it remembers are buffers, which a resumed one has again.

    Gradients and weights must be whole in every process: one alone, or `ddp`.
    """

    def begin(self, steps: int) -> None:
        """Called once, before the first step of `steps` or of those that are left. Raises RequestError."""

    def penalty(self) -> torch.Tensor | None:
        """A scalar that is added to the mean loss of every step; logged losses are without it."""
        return None

    def stepped(self, step: int) -> None:
        """Called after the update of step 1, 2, …, while parameters still have the gradients it was made with."""
