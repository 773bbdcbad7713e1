"""What goes along with a training inside the model: a module of it that adds to the loss and acts after every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graft.errors import RequestError


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


def companions_of(model: nn.Module, steps: int, spread: bool) -> list[Companion]:
    """Those inside `model`, told how long the training is. Raises RequestError where weights are `spread`."""
    found = [module for module in model.modules() if isinstance(module, Companion)]
    if found and spread:
        raise RequestError(
            f"expected whole weights in every process for {type(found[0]).__name__}, which reads gradients between "
            "steps, found them spread: use `parallel: ddp`"
        )
    for companion in found:
        companion.begin(steps)
    return found


def add_gradient(penalty: torch.Tensor | None, parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradient of `penalty`, the same in every process, to that of `parameters`; not by a backward pass.

    That would have processes exchange it, and count parameters twice that a batch does not reach.
    """
    if penalty is None:
        return
    for parameter, found in zip(parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True):
        if found is not None:
            parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)
