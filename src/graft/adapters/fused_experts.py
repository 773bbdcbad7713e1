"""Fused experts: parameters that hold a matrix of each of several experts, found from types, names and sizes.

`transformers` keeps the experts of a layer in parameters [experts, outputs, inputs]; some modules keep them as
[experts, inputs, outputs], and some put the rows of all experts below each other in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from graft.errors import RequestError

EXPERT = re.compile(r"experts?(?![a-z])|Expert")
DOWN = re.compile(r"down|w2|wo|output")
UP = re.compile(r"up|gate|w1|w3|v1|wi|input")
PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types of weights that are not packed."""
COUNTS = ("num_experts", "moe_num_experts", "num_local_experts")
"""Attributes in which modules say how many experts they have."""
SIZES = (("input_size", "output_size"), ("in_features", "out_features"))
"""Attributes in which modules say what a matrix reads and what it gives."""


@dataclass(frozen=True)
class Fused:
    """A parameter of fused experts: `parameter` is its path in `module`, which computes with it.

    Each of its `count` matrices has `rows` and `columns`, as they lie in memory. `role`: `up` reads what the block
    passes on, `down` gives it. `turned`: whether rows are inputs; None where that cannot be told.
    """

    module: str
    parameter: str
    count: int
    rows: int
    columns: int
    role: str
    turned: bool | None

    @property
    def path(self) -> str:
        """Its name in the model."""
        return f"{self.module}.{self.parameter}"

    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs) of each expert. Raises RequestError where these cannot be told apart."""
        if self.turned is None:
            raise RequestError(
                f"{self.path}: expected sizes that tell the inputs of experts from their outputs, found matrices of "
                f"{self.rows} x {self.columns}: name other places (`on`)"
            )
        return (self.rows, self.columns) if self.turned else (self.columns, self.rows)


def fused_experts(modules: Mapping[str, nn.Module], start: str, width: int) -> list[Fused]:
    """The parameters of fused experts in the block whose modules' paths begin with `start`, in the model's order.

    `width`: channels of what the block passes on.
    """
    inside = {
        path: module for path, module in modules.items() if path.startswith(start) and _of_experts(modules, path, start)
    }
    found = [
        (type(module), one)
        for path, module in inside.items()
        if not isinstance(module, _ConvNd | nn.Linear)
        for name in module._parameters
        for one in _fused(modules, path, name, width)
    ]
    return [_told(one, [other.turned for kind, other in found if kind is mine]) for mine, one in found]


def _of_experts(modules: Mapping[str, nn.Module], path: str, start: str) -> bool:
    """Whether a module or one around it in the block says that it holds experts."""
    words = path[len(start) :].split(".")
    around = [modules[f"{start}{'.'.join(words[: i + 1])}"] for i in range(len(words))]
    return any(map(EXPERT.search, words)) or any(EXPERT.search(type(module).__name__) for module in around)


def _fused(modules: Mapping[str, nn.Module], path: str, name: str, width: int) -> Iterator[Fused]:
    weight = modules[path]._parameters[name]
    if weight is None or weight.dtype not in PLAIN:
        return
    holder, parameter, shape = path, name, tuple(weight.shape)
    if weight.dim() == 2:  # experts below each other, which the module around takes apart
        holder, _, last = path.rpartition(".")
        parameter = f"{last}.{name}"
        count = next((n for key in COUNTS if isinstance(n := getattr(modules[holder], key, None), int)), 0)
        if not count or shape[0] % count or shape[0] == count or shape[1] != width:
            return
        shape = (count, shape[0] // count, shape[1])
    if len(shape) == 3:
        said = path.rpartition(".")[2] if name == "weight" else name
        role = "down" if DOWN.search(said) else "up" if UP.search(said) else ""
        yield Fused(holder, parameter, *shape, role, _turned(modules[holder], role, *shape[1:], width))


def _turned(module: nn.Module, role: str, rows: int, columns: int, width: int) -> bool | None:
    """Whether rows are inputs: as the module says, else from what the block passes on; None where neither tells."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    for names in SIZES:
        inputs, outputs = (getattr(module, name, None) for name in names)
        if inputs != outputs and {inputs, outputs} == {rows, columns}:
            return bool(inputs == rows)
    if role and (rows == width) != (columns == width):
        return (rows == width) == (role == "up")
    return None


def _told(one: Fused, alike: Sequence[bool | None]) -> Fused:
    """What the sizes of one parameter do not tell is what those of all others in modules of its type do (`alike`)."""
    known = set(alike) - {None}
    return replace(one, turned=known.pop()) if one.turned is None and len(known) == 1 else one
