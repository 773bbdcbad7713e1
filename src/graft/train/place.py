"""Where training runs: one process or several (torchrun), on which device. What accelerate does for us is in here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import nn

from graft.errors import RequestError

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


class Place:
    """The processes of a training and this process's device. Precision is the loop's own affair, not accelerate's."""

    def __init__(self, device: str | None, track: Sequence[str], out: Path):
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.accelerator = Accelerator(
            mixed_precision="no",
            cpu=several and meet_on_cpu(device),
            log_with=list(track) or None,
            project_dir=out,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        if self.accelerator.distributed_type not in _SUPPORTED:
            kind = self.accelerator.distributed_type.value
            raise RequestError(f"expected one process or torchrun's data parallel ones, found {kind}; launch it so")
        self.main, self.rank = self.accelerator.is_main_process, self.accelerator.process_index
        self.world = self.accelerator.num_processes
        given = torch.device(device) if device and not several else None
        self.device: torch.device = given or self.accelerator.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` (on `device` already), averaging its gradients over the processes where there are several.

        A model says by an attribute `leaves_unused` that not every batch reaches all of its parameters.
        """
        self.accelerator.ddp_handler.find_unused_parameters = getattr(model, "leaves_unused", False)
        return self.accelerator.prepare_model(model, device_placement=False) if self.world > 1 else model

    def without_sync(self, model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
        """Inside, backward passes of the wrapped model do not exchange gradients (where `wanted`)."""
        return self.accelerator.no_sync(model) if wanted and self.world > 1 else nullcontext()

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over the processes, in float64. One exchange; costs nothing where there is one process."""
        if self.world == 1:
            return list(numbers)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        mine = torch.tensor(list(numbers), dtype=dtype, device=self.device)
        torch.distributed.all_reduce(mine)
        return [float(number) for number in mine.tolist()]

    def gather(self, thing: Any) -> list[Any]:
        """`thing` (a plain value) of every process, in order."""
        return gather_object([thing]) if self.world > 1 else [thing]

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()


def meet_on_cpu(device: str | None) -> bool:
    """Whether several processes meet on the CPU: where it is asked for, and where there is nothing else to meet on.

    accelerate must be told the latter; each process would take itself for the only one.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device == "cpu" or found is None or found.type == "mps"


@contextmanager
def main_first() -> Iterator[None]:
    """Where there are several processes, the others go in when the first is through: they find what it left in caches.

    An error in the first one ends it, and the launcher ends the others.
    """
    rank, world = processes()
    if rank:
        torch.distributed.barrier()
    yield
    if world > 1 and not rank:
        torch.distributed.barrier()


def processes() -> tuple[int, int]:
    """(which process this is, how many there are); (0, 1) where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
