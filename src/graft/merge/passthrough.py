"""Passthrough: weights taken over as they are; with slices, layers of several models stacked into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from graft.merge.settings import MergeSettings
from graft.settings import ModelRef
from graft.settings import Settings as Base

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


class Slice(Base):
    """Layers `first` to `last − 1` of a model."""

    model: Annotated[ModelRef, Field(description="Whose layers.")]
    layers: Annotated[tuple[int, int], Field(description="First layer, and the one after the last.")]

    @model_validator(mode="after")
    def _forward(self) -> Slice:
        if not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"expected [first, after the last], found {list(self.layers)}")
        return self


class Settings(MergeSettings):
    """One model as it is, or slices of layers one after the other (embeddings of the first, head of the last)."""

    method: Literal["passthrough"] = "passthrough"
    models: Annotated[list[ModelRef], Field(max_length=1, description="The model; or give `slices`.")] = []
    slices: Annotated[list[Slice], Field(description="Layers of models, in the order in which they run.")] = []
    scale: Annotated[float, Field(description="Factor of all weights.")] = 1.0

    @model_validator(mode="after")
    def _one_way(self) -> Settings:
        if bool(self.models) == bool(self.slices):
            raise ValueError("expected one model or some slices, found " + ("both" if self.models else "neither"))
        return self

    @property
    def names(self) -> list[str]:
        """The models, each once."""
        return list(self.models) or list(dict.fromkeys(part.model for part in self.slices))


def scaled(model: Tensor, scale: float) -> Tensor:
    """`s θ`, in place."""
    return model if scale == 1 else model.mul_(scale)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, nothing measured before. A tensor has one source."""

    def make(piece: Piece) -> Tensor:
        return scaled(piece.models[0], settings.scale)

    return make
