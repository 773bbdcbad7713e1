"""Gradients beside those that a training takes for itself, of weights that each process holds whole or in parts.

Where a process holds parts (FSDP2, tensor parallelism, ZeRO 3), so it does of a gradient: steps go elementwise on the
parts, dot products are sums over processes. Where it holds all (one process, DDP, ZeRO 1 and 2), nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from graft.data.turns import by_task, named
from graft.train.attention import Batch
from graft.train.multitask import without_labels
from graft.train.shards import average, copies, local, processes_of, settle
from graft.train.zero_parts import by_zero, gradient_by_zero, leaf_of

Gradient = list[torch.Tensor | None]
"""This process's parts of the gradients of parameters; None for those that a loss does not reach."""


def mean_loss(model: nn.Module, batch: Batch, weight: float, **options: Any) -> torch.Tensor:
    """The loss a unit of a batch of `weight` units, which every process has; the model is called with `options`.

    With weights in parts it is the mean over the processes, each of which reads rows of its own.
    """
    share, shares = _share(model)
    return model(_own_rows(batch, share, shares), **options) * (shares / max(weight, 1))


def _share(model: nn.Module) -> tuple[int, int]:
    """(which it is, how many there are) of those that hold a model in parts and need not read the same rows."""
    if any(by_zero(p) for p in model.parameters()):
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    return (0, 1) if mesh is None else (mesh.get_local_rank("data"), mesh["data"].size())


def _own_rows(batch: Batch, share: int, shares: int) -> Batch:
    """Every `shares`-th row; where there is none, one without labels, since all put the weights together."""
    if shares == 1:
        return batch
    found: dict[str, torch.Tensor] = {}
    for task, rows in by_task(batch).items():
        there = share < len(rows["labels"])
        own = {name: tensor[share::shares] if there else tensor[:1] for name, tensor in rows.items()}
        found.update(named(task, own if there else without_labels(own)))
    return found


def loss_and_gradient(
    model: nn.Module, batch: Batch, weight: float, parameters: Sequence[nn.Parameter], **options: Any
) -> tuple[torch.Tensor, Gradient]:
    """`mean_loss`, detached, and its gradient. Gradients that the model holds stay as they are."""
    in_parts = any(isinstance(p, DTensor) for p in model.parameters())
    with _held_back(model) if in_parts else nullcontext() as trained, torch.enable_grad():
        loss = mean_loss(model, batch, weight, **options)
        if any(by_zero(p) for p in parameters):
            return loss.detach(), gradient_by_zero(loss, parameters)
        if trained is None:
            return loss.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True))
        # FSDP gives each process its parts in backward passes alone
        loss.backward()
        average([p for p in trained if not isinstance(p, DTensor)], torch.distributed.get_world_size())
        return loss.detach(), [None if p.grad is None else local(p.grad) for p in parameters]


@contextmanager
def _held_back(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside, the trained parameters of a model, which it gives, have no gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        yield trained
    finally:
        for parameter, before in zip(trained, held, strict=True):
            parameter.grad = before


def added(one: Gradient, other: Gradient) -> Gradient:
    """Their sum."""
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]


def dot(one: Gradient, other: Gradient, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """This process's part of the dot product of two gradients of `parameters`, a scalar; `summed` adds the parts."""
    processes = processes_of(parameters)
    triples = zip(one, other, parameters, strict=True)
    found = [
        torch.dot(a.flatten(), b.flatten()).float() / copies(p, processes)
        for a, b, p in triples
        if a is not None and b is not None
    ]
    device = parameters[0].device
    return torch.stack([part.to(device) for part in found]).sum() if found else torch.zeros((), device=device)


@torch.no_grad()
def descend(parameters: Sequence[nn.Parameter], along: Gradient, rate: float) -> None:
    """A step of gradient descent, in place."""
    for parameter, part in zip(parameters, along, strict=True):
        if part is not None:
            local(parameter).sub_(part, alpha=rate)
    # it holds casts of the weights as they were
    torch.clear_autocast_cache()


@contextmanager
def put_back(parameters: Sequence[nn.Parameter], model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """At the end, parameters of `model` are what they were. Gives this process's parts of them, as they are now."""
    held = [local(p).detach().clone() for p in parameters]
    try:
        yield held
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, held, strict=True):
                local(parameter).copy_(before)
        torch.clear_autocast_cache()
        settle(model)


def with_gradient(value: torch.Tensor, parts: Gradient, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """`value`, a scalar, as a function of `parameters` that has this gradient."""
    return _Given.apply(value, parts, *(_own(p) for p in parameters))


def _own(parameter: nn.Parameter) -> torch.Tensor:
    """What takes this process's part of a parameter's gradient."""
    if by_zero(parameter):
        return leaf_of(parameter)
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, parts: Gradient, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parts = parts
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if part is None else part * upstream[0].to(part.device) for part in ctx.parts)
