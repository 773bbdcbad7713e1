"""Where training runs: one process or several (torchrun), on which device, and how its weights lie in them.

What accelerate does for us is in here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from graft.errors import RequestError
from graft.progress import say
from graft.train.fully_sharded import Sharded, start_alone
from graft.train.parallel import Parallel
from graft.train.settings import TrainSettings
from graft.train.shards import Parts
from graft.train.zero import Zero
from graft.verb import Job

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


class Place:
    """The processes of a training and this process's device. Precision is the loop's own affair, not accelerate's.

    `share` of `shares`: which of the rows of a step this process reads; those that split layers read the same, and with
    weights in parts all do for an objective that `moves` them, which divides rows itself. `group`: which of the groups
    that split layers it is in; those in one draw the same random numbers.
    """

    def __init__(
        self, device: str | None, track: Sequence[str], out: Path, parallel: Parallel | None = None, moves: bool = False
    ):
        self.parallel = parallel or Parallel()
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
        self._check_processes()
        in_parts = self.parallel.method == "fsdp" or self.parallel.spread == 3
        alike = self.world if moves and in_parts else self.parallel.tensor
        self.shares, self.share = self.world // alike, self.rank // alike
        self.group = self.rank // self.parallel.tensor
        self.sharded: Sharded | Zero | None = None
        self.moves = moves
        self.by_hand = moves or self.parallel.method == "fsdp"

    def _check_processes(self) -> None:
        wanted, tensor = self.parallel.devices, self.parallel.tensor
        if wanted is not None and wanted != self.world:
            raise RequestError(f"expected {wanted} processes (`parallel.devices`), found {self.world}")
        if self.world % tensor:
            raise RequestError(f"expected processes in groups of {tensor} (`parallel.tensor`), found {self.world}")

    def wrap(self, model: nn.Module, settings: TrainSettings) -> nn.Module:
        """`model`, as several processes train it together: itself where there is one.

        Whole and on `device`, it averages its gradients over the processes, but for an objective that moves its
        weights: then `parts` does. Spread, it moves to the device by parts. A model says by an attribute
        `leaves_unused` that not every batch reaches all of its parameters.
        """
        if self.parallel.method != "ddp":
            start_alone()
        if self.parallel.method == "fsdp":
            self.sharded = Sharded(model, self.device.type, self.world, self.parallel)
            return model
        if self.parallel.method == "zero":
            self.sharded = Zero(model, self.parallel, settings, self.moves)
            return model
        model.to(self.device)
        if self.world == 1 or self.moves:
            return model
        self.accelerator.ddp_handler.find_unused_parameters = getattr(model, "leaves_unused", False)
        return self.accelerator.prepare_model(model, device_placement=False)

    def parts(self, model: nn.Module) -> Parts:
        """What of the trained weights of a model, wrapped or not, this process holds."""
        return Parts([p for p in model.parameters() if p.requires_grad], self.world, self.by_hand)

    @property
    def engine(self) -> Zero | None:
        """What takes backward passes and steps in the loop's place, where something does."""
        return self.sharded if isinstance(self.sharded, Zero) else None

    def plain(self) -> AbstractContextManager[Any]:
        """Inside, the model that was wrapped is whole in the main process, to be saved. Every process must enter."""
        return nullcontext() if self.sharded is None else self.sharded.plain(self.main)

    def release(self) -> None:
        """Leave the model that was wrapped as it came, whole in every process."""
        if self.sharded is not None:
            self.sharded.release()

    def without_sync(self, model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
        """Inside, backward passes of the wrapped model do not exchange gradients (where `wanted` and it is whole)."""
        return self.accelerator.no_sync(model) if wanted and isinstance(model, DDP) else nullcontext()

    def take(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on this process's device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Inside, forward passes compute in this precision (`fp32`, `bf16` or `fp16`) where that is safe."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        if dtype is None:
            return nullcontext()
        # weights in parts come and go: their casts would stay till the end of the forward pass
        return torch.autocast(self.device.type, dtype, cache_enabled=self.sharded is None)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over the shares, in float64. One exchange; costs nothing where there is one process."""
        if self.world == 1:
            return list(numbers)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        mine = torch.tensor(list(numbers), dtype=dtype, device=self.device)
        torch.distributed.all_reduce(mine)
        # some have read the same
        return [float(number) / (self.world // self.shares) for number in mine.tolist()]

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


def tell(job: Job, doing: str) -> None:
    """Say what is being done for a node, before there are steps to count; once where there are several processes."""
    if processes()[0] == 0:
        say(f"{job.name}: {doing}")
