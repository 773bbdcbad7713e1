"""Run as a script by two processes, which do not have gradients of the same parameters: python apart.py FOLDER

Each writes FOLDER/RANK: norms of gradients, and what an optimizer makes of them.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from graft.train.shards import Parts, local, whole

PATIENCE = timedelta(seconds=20)
"""How long a process waits for the other: ages, for what is exchanged here."""
WHERE = {"both": ("abcd", "abcd"), "first": ("abcd", ""), "none": ("", ""), "others": ("ac", "b")}
"""A case → the parameters that the first process has a gradient of, and the second."""
SHAPES = {"a": (6, 3), "b": (4,), "c": (5, 2), "d": ()}
CUT = {"a": [Shard(0)], "b": [Shard(0)], "c": [Replicate()], "d": None}


def tensors(seed):
    """Whole ones; the last is a single number, which no process holds in parts."""
    drawn = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=drawn) for name, shape in SHAPES.items()}


def held(mesh, seed):
    """The same as two processes hold them."""
    return {n: t if CUT[n] is None else distribute_tensor(t, mesh, CUT[n]) for n, t in tensors(seed).items()}


def norm(parts, parameters, gradients, mine):
    """That of a gradient of which this process has the parameters `mine`."""
    for name, parameter in parameters.items():
        parts.of[parameter].grad = local(gradients[name]) if name in mine else None
    return parts.norm()


def learned(parts, parameters, gradients, rank):
    """Weights and moments behind two steps: the first process has a gradient of what is not copied, the second none."""
    optimizer = torch.optim.AdamW(parts.of.values(), lr=0.1)
    for _ in range(2):
        for name in "abd" if rank == 0 else "":
            parameters[name].grad = gradients[name].clone()
        parts.take_gradients()
        optimizer.step()
        parts.drop_gradients()
    moments = {name: whole(tensor) for name, tensor in parts.moments(optimizer).items()}
    return {**moments, **{name: whole(parameter) for name, parameter in parameters.items()}}


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    mesh = init_device_mesh("cpu", (2,))
    parameters = {name: nn.Parameter(tensor) for name, tensor in held(mesh, 0).items()}
    assert isinstance(parameters["a"], DTensor)
    gradients = held(mesh, 1)
    parts = Parts(list(parameters.values()), processes=2, by_hand=True)
    found = {f"norm, {case}": norm(parts, parameters, gradients, mine[rank]) for case, mine in WHERE.items()}
    parts.drop_gradients()
    save_file(found | learned(parts, parameters, gradients, rank), Path(sys.argv[1]) / str(rank))
