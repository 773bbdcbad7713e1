"""The mix-and-match adapter: a short prefix and a wide parallel adapter (He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graft.adapters.point import Layers, Point
from graft.settings import Settings as Base


class Settings(Base):
    """Prefix tuning in attention, a scaled parallel adapter in the feed-forward."""

    length: Annotated[int, Field(ge=1, description="Learned keys in each attention.")] = 16
    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 64
    scale: Annotated[float | Literal["learned"], Field(description="What the adapter's change is multiplied by.")] = 4.0
    gate: Annotated[
        bool,
        Field(
            description="A gate for each head, zero at first: training starts from the model as it is. Without it as "
            "published, from random keys."
        ),
    ] = True
    layers: Layers = None


def points(settings: Settings) -> list[Point]:
    """The two points of the design space that these settings name."""
    return [
        Point(
            form="softmax",
            insertion="parallel",
            on=["attention"],
            layers=settings.layers,
            size=settings.length,
            gate=settings.gate,
        ),
        Point(
            form="bottleneck",
            insertion="parallel",
            on=["feed_forward"],
            layers=settings.layers,
            composition="scaled",
            scale=settings.scale,
            size=settings.width,
            biases=True,
        ),
    ]
