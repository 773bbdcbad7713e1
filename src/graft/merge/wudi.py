"""WUDI: the merged task vector that disturbs each of the task vectors least in the space of its own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge._layers import prepare_layers
from graft.merge._options import SubspaceSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Tensors


prepare = prepare_layers


class Settings(SubspaceSettings):
    """`θ₀ + λ δ` with the δ that makes `sum_m ‖(δ − δ_m) δ_mᵀ‖² / ‖δ_m‖²` small for linear layers, beginning with the
    sum of the task vectors. Other tensors: the mean of the task vectors."""

    method: Literal["wudi"] = "wudi"
    solver: Annotated[
        Literal["adam", "exact"],
        Field(description="Steps of Adam, as the paper; or the minimum itself (of several, the nearest to the sum)."),
    ] = "adam"
    steps: Annotated[int, Field(ge=0, description="Steps of Adam.")] = 300
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate of Adam.")] = 1e-5


def normal_equations(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`A = sum_m δ_mᵀ δ_m / ‖δ_m‖² [in, in]`, `B = sum_m δ_m δ_mᵀ δ_m / ‖δ_m‖² [out, in]`, float32.

    Half the gradient of the objective is `δ A − B`. A task vector of zero is left out.
    """
    import torch

    out, wide = deltas[0].shape
    a, b = deltas[0].new_zeros(wide, wide), deltas[0].new_zeros(out, wide)
    for delta in deltas:
        square = float(delta.square().sum(dtype=torch.float64))
        if square > 0:
            gram = (delta.T @ delta).div_(square)
            a.add_(gram)
            b.addmm_(delta, gram)
    return a, b


def descended(start: Tensor, a: Tensor, b: Tensor, steps: int, learning_rate: float) -> Tensor:
    """`start [out, in]` after steps of Adam on the objective. Cheng et al. 2025, arXiv:2503.08099, equation 13."""
    import torch

    made = start.clone()
    made.grad = torch.zeros_like(made)
    adam = torch.optim.Adam([made], lr=learning_rate)
    for _ in range(steps):
        torch.mm(made, a, out=made.grad).sub_(b).mul_(2)
        adam.step()
    return made.detach()


def solved(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The minimum nearest to `start [out, in]`: `start − (start A − B) A⁺`."""
    import torch

    values, vectors = torch.linalg.eigh(a.double())
    floor = float(values[-1]) * len(values) * torch.finfo(torch.float32).eps
    kept = values > floor
    basis = vectors[:, kept]
    away = (start.double() @ a.double() - b.double()) @ basis
    return (start.double() - (away / values[kept]) @ basis.T).float()


def undisturbed(deltas: Sequence[Tensor], settings: Settings) -> Tensor:
    """The merged task vector of task vectors, each [out, in] float32; so is the result."""
    total = sum(deltas[1:], deltas[0])
    if len(deltas) == 1:
        return total
    a, b = normal_equations(deltas)
    if settings.solver == "exact":
        return solved(total, a, b)
    return descended(total, a, b, settings.steps, settings.learning_rate)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """One matrix at a time, whole."""
    from graft.merge._whole import subspace

    return subspace(tensors, settings, lambda deltas: undisturbed(deltas, settings))
