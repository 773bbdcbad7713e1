"""Task arithmetic: a base plus weighted differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import DeltaSettings
from graft.settings import Number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


class Settings(DeltaSettings):
    """`θ₀ + λ sum_m w_m (θ_m − θ₀)`. A negative weight takes a skill away; `{base: c, models: {b: 1, a: -1}}` is the
    analogy c + (b − a)."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    scale: Annotated[Number, Field(description="Factor of the combined task vector, λ in the papers.")] = 1.0
    normalise: Annotated[bool, Field(description="Divide by the sum of the weights.")] = False


def add_deltas(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`θ₀ + sum_m w_m (θ_m − θ₀)` over float32 tensors of one shape; the models are overwritten.

    Ilharco et al. 2023, arXiv:2212.04089.
    """
    total = models[0].sub_(base).mul_(weights[0])
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total.add_(model.sub_(base), alpha=weight)
    return total.add_(base)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, nothing measured before."""
    from graft.merge import _fused

    whole = sum(settings.weights)
    divisor = whole if settings.normalise and abs(whole) >= 1e-8 else 1.0
    weights = [settings.scale * weight / divisor for weight in settings.weights]

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        return add_deltas(piece.base, piece.models, weights)

    return _fused.Fused(make, _fused.deltas(weights))
