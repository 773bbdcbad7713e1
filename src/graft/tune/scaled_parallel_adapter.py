"""A parallel adapter whose change is scaled (He et al. 2022, arXiv:2110.04366, section 4.6)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graft.adapters.point import Layers, Nonlinearity, Point
from graft.settings import Settings as Base


class Settings(Base):
    """h + s · up(f(down(x))), x being what the sublayer reads."""

    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 64
    scale: Annotated[
        float | Literal["learned"], Field(description="What the change is multiplied by; the paper's best is 4.")
    ] = 4.0
    on: Annotated[
        list[str], Field(min_length=1, description="Sublayers: `attention`, `cross_attention`, `feed_forward`.")
    ] = ["feed_forward"]
    nonlinearity: Annotated[Nonlinearity, Field(description="Between down and up.")] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1, description="Share of the bottleneck that is dropped in training.")] = (
        0.0
    )
    layers: Layers = None


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [
        Point(
            form="bottleneck",
            insertion="parallel",
            on=settings.on,
            layers=settings.layers,
            composition="scaled",
            scale=settings.scale,
            size=settings.width,
            nonlinearity=settings.nonlinearity,
            biases=True,
            dropout=settings.dropout,
        )
    ]
