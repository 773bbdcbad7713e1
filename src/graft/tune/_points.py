"""What methods share whose points have one form: settings of a bottleneck and of learned keys, and their points."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from graft.adapters.point import Layers, Nonlinearity, Point
from graft.settings import Settings

Sublayers = Annotated[
    list[str], Field(min_length=1, description="Sublayers: `attention`, `cross_attention`, `feed_forward`.")
]
Scale = Annotated[float | Literal["learned"], Field(description="What the adapter's change is multiplied by.")]


class Bottleneck(Settings):
    """Down to `width` channels, a function, and up again."""

    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 64
    nonlinearity: Annotated[Nonlinearity, Field(description="Between down and up.")] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1, description="Share of the bottleneck that is dropped in training.")] = (
        0.0
    )
    layers: Layers = None


class Keys(Settings):
    """Learned keys and values in attention."""

    length: Annotated[int, Field(ge=1, description="Learned keys in each attention.")] = 16
    gate: Annotated[
        bool,
        Field(
            description="A gate for each head, zero at first: training starts from the model as it is. Without it as "
            "published, from random keys."
        ),
    ] = True
    layers: Layers = None


def bottleneck(settings: Bottleneck, insertion: Literal["parallel", "after"], on: list[str], **more: Any) -> Point:
    """The point of a bottleneck at `on`; `more` says how it is composed."""
    return Point(
        form="bottleneck",
        insertion=insertion,
        on=on,
        layers=settings.layers,
        size=settings.width,
        nonlinearity=settings.nonlinearity,
        biases=True,
        dropout=settings.dropout,
        **more,
    )


def keys(settings: Keys, on: list[str]) -> Point:
    """The point of learned keys at `on`; without a gate, as published, they take the first positions."""
    return Point(
        form="softmax",
        insertion="parallel",
        on=on,
        layers=settings.layers,
        size=settings.length,
        gate=settings.gate,
        shift=not settings.gate,
    )
