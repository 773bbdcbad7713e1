"""The language adapter of MAD-X: one after the feed-forward, and one in the embeddings that is undone before the head
(Pfeiffer et al. 2020, arXiv:2005.00052)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Layers, Nonlinearity, Point
from graft.settings import Settings as Base


class Settings(Base):
    """A bottleneck behind the feed-forward and an invertible adapter; a task's adapter is stacked on top of it."""

    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 64
    coupling: Annotated[int, Field(ge=1, description="Channels of the invertible adapter's bottlenecks.")] = 32
    nonlinearity: Annotated[Nonlinearity, Field(description="Between down and up.")] = "relu"
    layers: Layers = None


def points(settings: Settings) -> list[Point]:
    """The two points of the design space that these settings name."""
    return [
        Point(form="invertible", on=["embeddings"], size=settings.coupling, nonlinearity=settings.nonlinearity),
        Point(
            form="bottleneck",
            insertion="after",
            on=["feed_forward"],
            layers=settings.layers,
            size=settings.width,
            nonlinearity=settings.nonlinearity,
            biases=True,
        ),
    ]
