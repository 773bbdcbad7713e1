"""RAM: a change that one model alone made is kept whole; where several changed a parameter, their mean is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import DeltaSettings
from graft.settings import ModelRef, Number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


class RamSettings(DeltaSettings):
    """A base plus task vectors of models trained by reinforcement, which change few parameters."""

    models: Annotated[list[ModelRef], Field(min_length=1, description="Models; none weighs more.")]
    epsilon: Annotated[Number, Field(ge=0, description="A change of at most this counts as none.")] = 1e-5


class Settings(RamSettings):
    """`θ₀ + sum_m δ_m / n`, n the number of models that changed the parameter."""

    method: Literal["ram"] = "ram"


def changed(deltas: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Deltas with 0 for no change, and how many models changed each element (float32)."""
    from torch.nn.functional import hardshrink

    thin = [hardshrink(delta, epsilon) for delta in deltas]
    count = thin[0].sign().abs_()
    for delta in thin[1:]:
        count.add_(delta.sign().abs_())
    return thin, count


def reinforced(deltas: Sequence[Tensor], epsilon: float, alone: Sequence[float]) -> Tensor:
    """The mean over those that changed an element; a change of one model alone is multiplied by its `alone`.

    RAM and RAM+, arXiv:2601.13572. Float32 tensors of one shape.
    """
    import torch

    thin, count = changed(deltas, epsilon)
    share = count.clamp(min=1).reciprocal_()
    single = (count == 1).float()
    total = torch.zeros_like(count)
    for delta, factor in zip(thin, alone, strict=True):
        total.add_(delta.mul(share) if factor == 1 else delta.mul(share).mul_(1 + single * (factor - 1)))
    return total


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, nothing measured before."""

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        return reinforced(piece.deltas(), settings.epsilon, [1.0] * len(settings.names)).add_(piece.base)

    return make
