"""Companions of a training inside the model: found before the first step, their penalties made gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graft.adapters.companion import Companion
from graft.errors import RequestError


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
