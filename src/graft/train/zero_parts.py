"""Parameters that DeepSpeed spreads in stage 3: flat parts of one size, the last one filled up.

Between its uses a parameter is empty, and `ds_tensor` is this process's part of it. DeepSpeed puts it together and
takes it apart by hooks on modules, in passes of the training and in others alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

LEAF = "graft_leaf"
"""The attribute of a parameter that takes gradients by hand: this process's part of them goes to `leaf_of`."""


def by_zero(tensor: Any) -> bool:
    """Whether DeepSpeed has spread a parameter."""
    return getattr(tensor, "ds_tensor", None) is not None


def part_by_zero(parameter: Any) -> torch.Tensor:
    """This process's part `[numbers]` of a parameter, without what fills it up; it shares its memory."""
    part = parameter.ds_tensor.detach()
    left = parameter.ds_numel - torch.distributed.get_rank() * part.numel()
    return part.narrow(0, 0, max(0, min(left, part.numel())))


def settle_by_zero(parameters: Iterable[Any]) -> None:
    """Take apart what passes that are none of the training put together."""
    spread = next((p for p in parameters if hasattr(p, "_z3_optimizer")), None)
    if spread is not None:
        spread._z3_optimizer.parameter_offload.partition_all_parameters()


def gradient_by_zero(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
    """This process's parts of the gradient of the mean of `loss` over the processes, all of which must ask.

    Each is taken apart as soon as it is there, and none reaches DeepSpeed. None for those that it does not reach.
    """
    found: dict[int, torch.Tensor] = {}

    def taken(place: int) -> Any:
        def take(gradient: torch.Tensor) -> torch.Tensor:
            found[place] = _scattered(gradient, parameters[place])
            return gradient.new_zeros(()).expand_as(gradient)  # which takes no memory

        return take

    hooks = [parameter.register_hook(taken(place)) for place, parameter in enumerate(parameters)]
    try:
        torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    settle_by_zero(parameters)
    return [found.get(place) for place in range(len(parameters))]


@torch.no_grad()
def _scattered(gradient: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This process's part of the mean of a whole gradient over the processes, where the parameter's part lies."""
    processes, own = torch.distributed.get_world_size(), part_by_zero(parameter)
    whole = gradient.new_zeros(processes * parameter.ds_tensor.numel())
    whole[: gradient.numel()] = gradient.flatten()
    part = whole.new_empty(parameter.ds_tensor.numel())
    torch.distributed.reduce_scatter_tensor(part, whole)
    return (part[: own.numel()] / processes).to(own.device)


def make_leaves(parameters: Iterable[Any]) -> None:
    """Let parameters take gradients by hand."""
    for parameter in parameters:
        part = part_by_zero(parameter)
        # a leaf has a gradient; its numbers are never asked
        setattr(parameter, LEAF, part.new_zeros(()).expand(part.shape).requires_grad_())


def leaf_of(parameter: Any) -> torch.Tensor:
    """What stands for this process's part of a parameter where a gradient is given by hand."""
    leaf: torch.Tensor = getattr(parameter, LEAF)
    return leaf


def hand_over(parameters: Iterable[Any]) -> None:
    """Give DeepSpeed, in the place of its own, the gradients that leaves have taken, and forget these."""
    from deepspeed.utils import safe_set_local_grad

    for parameter in parameters:
        leaf, value = leaf_of(parameter), torch.zeros_like(parameter.ds_tensor)
        if leaf.grad is not None:
            value[: leaf.numel()] = leaf.grad
        safe_set_local_grad(parameter, value)
        leaf.grad = None
