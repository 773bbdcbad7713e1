"""Weights spread over processes by FSDP2, split by tensor parallelism, and put together again: the model as it came."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from graft.adapters.packed import is_packed
from graft.adapters.stack import Adapters
from graft.train.parallel import Parallel
from graft.train.shards import whole
from graft.train.tensor_parallel import split

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


class Sharded:
    """A model whose weights lie in parts: each of its blocks is put together while it computes, and only then.

    `processes` in all hold it, `parallel.tensor` of them each part of a matrix. Scalars and packed weights stay whole
    in every process; nobody averages the gradients of scalars.
    """

    def __init__(self, model: nn.Module, device: str, processes: int, parallel: Parallel):
        self.model = model
        # the loss reads what the model gives and changes nothing in it
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        rates = {name: p.rate for name, p in model.named_parameters() if hasattr(p, "rate")}
        before = {module: set(vars(module)) for module in model.modules()}
        groups = (processes // parallel.tensor, parallel.tensor)
        mesh = init_device_mesh(device, groups, mesh_dim_names=("data", "tensor"))
        if parallel.tensor > 1:
            model.to(device)
            # of several tasks, the model that has their body
            split(getattr(model, "root", model), mesh["tensor"])
        _spread(model, mesh["data"], parallel.offload == "cpu")
        self.added = {module: set(vars(module)) - known for module, known in before.items()}
        for name, parameter in model.named_parameters():
            if name in rates:
                parameter.rate = rates[name]  # type: ignore[attr-defined]

    def _places(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Where parameters in parts stand, tied ones in each of their places."""
        return [
            (module, name, parameter)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and isinstance(parameter, DTensor)
        ]

    def _gathered(self, keep: bool) -> dict[nn.Parameter, nn.Parameter]:
        """Every parameter whole and on the CPU, if it is to be kept; every process must ask."""
        found = {}
        for parameter in dict.fromkeys(parameter for _, _, parameter in self._places()):
            tensor = whole(parameter)
            if keep:
                found[parameter] = nn.Parameter(tensor.cpu(), parameter.requires_grad)
        return found

    @contextmanager
    def plain(self, here: bool) -> Iterator[None]:
        """Inside, the model is as it came, with all its weights, in the processes that say `here`. All must enter."""
        gathered = self._gathered(here)
        places = self._places() if here else []
        classes = {module: type(module) for module in self.model.modules()} if here else {}
        for module, name, parameter in places:
            module._parameters[name] = gathered[parameter]
        for module in classes:
            module.__class__ = _plain_class(module)
        try:
            yield
        finally:
            for module, cls in classes.items():
                module.__class__ = cls
            for module, name, parameter in places:
                module._parameters[name] = parameter

    def release(self) -> None:
        """Leave the model as it came, on the CPU with all its weights, in every process."""
        gathered = self._gathered(True)
        for module, name, parameter in self._places():
            module._parameters[name] = gathered[parameter]
        for module in self.model.modules():
            module.__class__ = _plain_class(module)
            for name in self.added.get(module, ()):
                vars(module).pop(name, None)
            for hooks in (getattr(module, name) for name in HOOKS):
                for key in [key for key, hook in hooks.items() if _of_torch(hook)]:
                    del hooks[key]
        self.model.cpu()


def _spread(model: nn.Module, mesh: DeviceMesh, offload: bool) -> None:
    """Spread the parameters of `model` over `mesh`: those of each block together, what remains with the model."""
    pinned = mesh.device_type != "cpu"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for scalar in scalars:
        scalar.data = scalar.data.to(mesh.device_type)
    packed = [module.to(mesh.device_type) for module in model.modules() if is_packed(module)]
    whole = scalars | {module.get_parameter("weight") for module in packed}
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=whole)
        assert isinstance(module, FSDPModule)
        # a sum that is divided behind it: gloo knows no mean
        module.set_force_sum_reduction_for_comms(True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is put together by itself: the members of the outermost lists of modules that have parameters.

    None where adapters have learned tokens: what comes of these leaves a block by its keys and values, so that backward
    passes come upon the block without notice; the model is then put together from one end of a step to the other.
    """
    stacks = [module for module in model.modules() if isinstance(module, Adapters)]
    if any(point.form == "tokens" for stack in stacks for points in stack.points.values() for point in points):
        return []
    lists: list[str] = []
    found: list[nn.Module] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append(path)
            found += [member for member in module if next(member.parameters(), None) is not None]
    return list(dict.fromkeys(found))


def _plain_class(module: nn.Module) -> type:
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _of_torch(hook: object) -> bool:
    """Whether FSDP hung this hook up."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def start_alone() -> None:
    """Make this process a group of its own, where no launcher made one: sharding wants a group."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(store=store, rank=0, world_size=1)
