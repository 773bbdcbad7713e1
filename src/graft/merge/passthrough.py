"""Passthrough: weights taken over as they are; with slices, layers of several models stacked into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from graft.merge.settings import MergeSettings
from graft.settings import ModelRef, Number

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


class Settings(MergeSettings):
    """One model as it is, or slices of layers one after the other (embeddings of the first, head of the last)."""

    method: Literal["passthrough"] = "passthrough"
    models: Annotated[list[ModelRef], Field(max_length=1, description="The model; or give `slices`.")] = []
    slices: Annotated[
        list[dict[ModelRef, tuple[int, int]]],
        Field(
            description="Layers [first, after the last] of one model after the other, in the order in which they run."
        ),
    ] = []
    scale: Annotated[Number, Field(description="Factor of all weights.")] = 1.0

    @model_validator(mode="after")
    def _one_way(self) -> Settings:
        if bool(self.models) == bool(self.slices):
            raise ValueError("expected one model or some slices, found " + ("both" if self.models else "neither"))
        if wrong := [part for part in self.slices if len(part) > 1]:
            raise ValueError(f"expected one model a slice, as nothing is averaged, found {', '.join(wrong[0])}")
        return self

    @property
    def names(self) -> list[str]:
        """The models, each once."""
        return list(self.models) or list(dict.fromkeys(model for part in self.slices for model in part))


def scaled(model: Tensor, scale: float) -> Tensor:
    """`s θ`, in place."""
    return model if scale == 1 else model.mul_(scale)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, nothing measured before. A tensor has one source."""

    def make(piece: Piece) -> Tensor:
        return scaled(piece.models[0], settings.scale)

    return make
