"""Experts whose weights lie in one parameter: which they are, and what each of them is given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"
"""What `transformers` calls the parameters [experts, …] of the matrices before and behind the activation."""


@dataclass(frozen=True)
class Experts:
    """One parameter that holds a matrix of each of several experts."""

    count: int
    inputs: int
    """Columns of each matrix: numbers that it is given."""
    transposed: bool
    """Whether the parameter is kept as [experts, in, out]."""

    @property
    def numbers(self) -> int:
        """Numbers in the Gram matrices of all of them."""
        return self.count * self.inputs**2


def are_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the layout that `transformers` has for them."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, LAST)


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Parameter → the experts in it, for every module of experts of a model."""
    found = {}
    for path, module in model.named_modules():
        if are_experts(module):
            for name, parameter in module.named_parameters(recurse=False):
                if name in (*FIRST, LAST) and parameter.dim() == 3:
                    wide = parameter.shape[1 if module.is_transposed else 2]
                    found[f"{path}.{name}"] = Experts(parameter.shape[0], wide, bool(module.is_transposed))
    return found


def number_of(stored: str) -> int | None:
    """Which expert a tensor of a checkpoint belongs to, by its name (`experts.3.w1`); None where that does not say."""
    found = re.search(r"experts\.(\d+)\.", stored)
    return int(found[1]) if found else None


def inputs_of(experts: Any, name: str, hidden: Tensor, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(expert, [n, in]): what its matrix in the parameter `name` is given of `hidden [tokens, width]`.

    `chosen [tokens, k]` are the experts of each token. One that is given nothing is left out.
    """
    for expert in range(getattr(experts, name).shape[0]):
        given = hidden[(chosen == expert).any(dim=-1)]
        if len(given):
            yield expert, _between(experts, given, expert) if name == LAST else given


def _between(experts: Any, given: Tensor, expert: int) -> Tensor:
    """What an expert makes of its input before its last matrix, [n, in of the last]."""
    name = FIRST[0] if experts.has_gate else FIRST[1]
    weight = getattr(experts, name)[expert]
    made = given @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        made = made + getattr(experts, f"{name}_bias")[expert]
    return experts._apply_gate(made) if experts.has_gate else experts.act_fn(made)
