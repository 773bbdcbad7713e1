"""Tensors that several processes hold in parts (DTensor), beside those that each holds whole.

Everything here takes both; `local`, `copies` and `summed` also parameters that DeepSpeed spreads (`zero_parts.py`).
What is written to disk is whole, so that a training goes on under any other placement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from graft.train.eight_bits import SCALES, each
from graft.train.optimizer import moments, set_moments
from graft.train.zero_parts import by_zero, part_by_zero, settle_by_zero


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, which shares its memory with `tensor`; the tensor itself where it is whole."""
    if by_zero(tensor):
        return part_by_zero(tensor)
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part`, this process's of a tensor that is laid out as `parameter` is, as one."""
    if not isinstance(parameter, DTensor) or part.shape != local(parameter).shape:
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, detached. Where it lies in parts every process must ask, in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    device = tensor.device_mesh.device_type
    # what is offloaded meets on the processes' devices
    found = tensor if tensor.device.type == device else like(tensor, local(tensor).to(device))
    assert isinstance(found, DTensor)
    return DTensor.full_tensor(found.detach())  # type: ignore[arg-type]


def whole_on_main(tensors: Mapping[str, torch.Tensor], main: bool) -> dict[str, torch.Tensor]:
    """All tensors whole, in the main process only; the others take part and get nothing."""
    found = {}
    for name, tensor in tensors.items():
        in_parts = isinstance(tensor, DTensor)
        if main or in_parts:
            gathered = whole(tensor)
            if main:
                found[name] = gathered.cpu() if in_parts else gathered
    return found


def part_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole `tensor`, cut as `parameter` is and where its part lies."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    device = parameter.device_mesh.device_type
    cut = distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return local(cut).to(local(parameter).device)


@torch.no_grad()
def fill(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Put a whole `tensor` into `target`, in place."""
    local(target).copy_(part_of(tensor, target))


def settle(model: nn.Module) -> None:
    """Take apart what a forward pass put together and no backward pass took apart again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    settle_by_zero(model.parameters())


def processes_of(parameters: Sequence[torch.Tensor]) -> int:
    """How many processes hold parameters together; 1 where each holds them whole."""
    in_parts = any(isinstance(p, DTensor) or by_zero(p) for p in parameters)
    return torch.distributed.get_world_size() if in_parts else 1


def copies(parameter: torch.Tensor, processes: int) -> float:
    """How many of `processes`, which hold a model together, hold what this one does of a parameter."""
    if by_zero(parameter):
        return 1
    if not isinstance(parameter, DTensor):
        return processes
    mesh = parameter.device_mesh
    cut = prod(mesh.size(d) for d, how in enumerate(parameter.placements) if not how.is_replicate())
    return processes / cut


def _meeting(parameters: Sequence[torch.Tensor]) -> str | None:
    """The kind of device on which processes meet that hold parameters in parts; None where each holds them whole."""
    for parameter in parameters:
        if by_zero(parameter):
            return parameter.device.type
        if isinstance(parameter, DTensor):
            return parameter.device_mesh.device_type
    return None


def summed(parts: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Numbers that this process has of its parts of parameters, added over the processes that hold these together.

    Every process must ask, with as many `parts`, of one shape.
    """
    meeting = _meeting(parameters)
    if meeting is None:
        return torch.stack(list(parts))
    total = torch.stack([part.to(meeting) for part in parts])
    torch.distributed.all_reduce(total)
    return total


class Parts:
    """What of the trained parameters this process holds: plain parameters, which an optimizer takes.

    A parameter that is whole is its own part. `processes`: how many hold the model together; `by_hand`: gradients of
    whole parameters are those of this process's rows alone, to be averaged here (nothing else does it).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], processes: int, by_hand: bool):
        self.parameters, self.processes, self.by_hand = list(parameters), processes, by_hand
        self.in_parts = any(isinstance(p, DTensor) for p in self.parameters)
        self.of = {p: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for p in self.parameters}

    def _owners(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """The parameter that each number in the optimizer's state belongs to."""
        of = {part: parameter for parameter, part in self.of.items()}
        return [of[part] for group in optimizer.param_groups for part in group["params"]]

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """The optimizer's state by `NUMBER.NAME`, laid out as the parameters are."""
        owners = self._owners(optimizer)
        held = moments(optimizer, in_parts=self.in_parts)
        return {name: like(owners[_number(name)], tensor) for name, tensor in held.items()}

    def set_moments(self, optimizer: torch.optim.Optimizer, held: Mapping[str, torch.Tensor]) -> None:
        """Put back what `moments` gave, whole."""
        owners = self._owners(optimizer)
        if self.in_parts:  # scales of blocks are not cut as the numbers are
            held = {name: _of_each(name, tensor, owners[_number(name)]) for name, tensor in held.items()}
        set_moments(optimizer, {name: part_of(tensor, owners[_number(name)]) for name, tensor in held.items()})

    def take_gradients(self) -> None:
        """Give the parts their gradients, as they stand behind a backward pass; zero where other processes have one.

        So the optimizer has a state for the same parameters in all of them.
        """
        if self.by_hand and self.processes > 1:
            average([p for p in self.parameters if not isinstance(p, DTensor)], self.processes)
        for parameter, held in zip(self.parameters, self._reached(), strict=True):
            part = self.of[parameter]
            if part is not parameter:
                part.data = local(parameter)
                own = parameter.grad
                part.grad = local(own) if own is not None else torch.zeros_like(part) if held else None

    def _reached(self) -> list[bool]:
        """Which of the parameters have a gradient in any process; where they lie in parts every process must ask."""
        there = torch.tensor([float(p.grad is not None) for p in self.parameters])
        if self.in_parts and self.processes > 1:
            there = summed([there], self.parameters)[0]
        return [count > 0 for count in there.tolist()]

    def norm(self) -> torch.Tensor:
        """The norm of the whole gradient, the same in every process; where it lies in parts every process must ask."""
        gradients = [(p, part.grad) for p, part in self.of.items() if part.grad is not None]
        if not self.in_parts:
            return get_total_norm([gradient for _, gradient in gradients])
        by_copies: dict[float, list[torch.Tensor]] = {}
        for parameter, gradient in gradients:
            by_copies.setdefault(copies(parameter, self.processes), []).append(gradient)
        # one number, whatever this process has gradients of
        square = torch.zeros((), device=_meeting(self.parameters))
        for held, some in by_copies.items():
            square += get_total_norm(some).to(square.device) ** 2 / held
        return summed([square], self.parameters)[0].sqrt()

    @torch.no_grad()
    def clip(self, most: float, norm: torch.Tensor) -> None:
        """Shrink the gradient, whose norm is `norm`, to `most`."""
        parts = list(self.of.values())
        if parts:
            clip_grads_with_norm_(parts, most, norm.to(parts[0].device))

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        for parameter, part in self.of.items():
            parameter.grad = part.grad = None


def _number(name: str) -> int:
    return int(name.partition(".")[0])


def _of_each(name: str, tensor: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Scales of blocks of a parameter's moments as one for each of its numbers; anything else as it is."""
    in_blocks = name.partition(".")[2] in SCALES.values() and tensor.shape != owner.shape
    return each(tensor, owner) if in_blocks else tensor


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter], processes: int) -> None:
    """The mean of each gradient over the processes, in place; one that no process has stays away."""
    if not parameters:
        return
    device = parameters[0].device
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    given = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([there, *(gradient.float().flatten() for gradient in given)])
    torch.distributed.all_reduce(flat)
    there, rest = flat[: len(parameters)], flat[len(parameters) :] / processes
    for parameter, held, gradient in zip(
        parameters, there.tolist(), rest.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if held else None
