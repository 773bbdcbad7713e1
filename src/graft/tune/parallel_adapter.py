"""An adapter beside a sublayer instead of after it (He et al. 2022, arXiv:2110.04366, section 3.3)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Layers, Nonlinearity, Point
from graft.settings import Settings as Base


class Settings(Base):
    """h + up(f(down(x))), x being what the sublayer reads."""

    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 64
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
            size=settings.width,
            nonlinearity=settings.nonlinearity,
            biases=True,
            dropout=settings.dropout,
        )
    ]
