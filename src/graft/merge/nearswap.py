"""NearSwap: where two models are close, take the other's value; where they are far, hardly move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import DeltaSettings
from graft.settings import ModelRef, Number

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


class Settings(DeltaSettings):
    """From the base towards one other model, by at most `t` in every parameter."""

    method: Literal["nearswap"] = "nearswap"
    models: Annotated[list[ModelRef], Field(min_length=1, max_length=1, description="The other model.")]
    t: Annotated[Number, Field(gt=0, description="How far a parameter may move.")]


def nearswap(base: Tensor, other: Tensor, t: float) -> Tensor:
    """`θ₀ + δ min(1, t / |δ|)`, which is `θ₀ + clamp(δ, −t, t)`; `other` is overwritten.

    Alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    return other.sub_(base).clamp_(-t, t).add_(base)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, nothing measured before."""

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        return nearswap(piece.base, piece.models[0], settings.t)

    return make
