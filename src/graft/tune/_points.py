"""What methods share whose points have one form: settings of a bottleneck and of learned keys, and their points."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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


GATE_RATE = 10.0
"""How many times as fast as the rest a gate learns."""


class Gate(Settings):
    """The gate of learned keys or tokens."""

    gate: Annotated[
        bool,
        Field(
            description="A gate for each head, zero at first: training starts from the model as it is. Without it as "
            "published, from random keys or tokens."
        ),
    ] = True
    gate_rate: Annotated[
        float,
        Field(
            gt=0,
            description="Learning rate of the gate, as a multiple: keys and values learn only as far as it is open.",
        ),
    ] = GATE_RATE

    @model_validator(mode="after")
    def _rate_of_a_gate(self) -> Gate:
        if not self.gate and self.gate_rate != GATE_RATE:
            raise ValueError(f"expected gate_rate with `gate: true`, found {self.gate_rate:g} without a gate")
        return self

    def gated(self) -> dict[str, Any]:
        """What a point is told of its gate."""
        return {"gate": self.gate, "gate_rate": self.gate_rate if self.gate else 1.0}


class Keys(Gate):
    """Learned keys and values in attention."""

    length: Annotated[int, Field(ge=1, description="Learned keys in each attention.")] = 16
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
        shift=not settings.gate,
        **settings.gated(),
    )
