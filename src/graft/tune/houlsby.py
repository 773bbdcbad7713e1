"""Adapters after attention and after the feed-forward of every block (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Layers, Nonlinearity, Point
from graft.settings import Settings as Base


class Settings(Base):
    """h + up(f(down(h))) behind both sublayers, before the residual connection."""

    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 32
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
            on=["attention", "feed_forward"],
            layers=settings.layers,
            size=settings.width,
            nonlinearity=settings.nonlinearity,
            biases=True,
            dropout=settings.dropout,
        )
    ]
