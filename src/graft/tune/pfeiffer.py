"""One adapter in every block, after the feed-forward (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Layers, Nonlinearity, Point
from graft.settings import Settings as Base


class Settings(Base):
    """h + up(f(down(h))) behind the feed-forward, before the residual connection."""

    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 64
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
            insertion="after",
            on=["feed_forward"],
            layers=settings.layers,
            size=settings.width,
            nonlinearity=settings.nonlinearity,
            biases=True,
            dropout=settings.dropout,
        )
    ]
