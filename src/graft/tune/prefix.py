"""Prefix tuning: learned keys and values in front of attention (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Layers, Point
from graft.settings import Settings as Base


class Settings(Base):
    """Attention sees so many learned keys, with learned values, before the text, in every block."""

    length: Annotated[int, Field(ge=1, description="Learned keys in each attention.")] = 16
    cross: Annotated[bool, Field(description="In front of cross-attention as well.")] = False
    gate: Annotated[
        bool,
        Field(
            description="A gate for each head, zero at first: training starts from the model as it is. Without it as "
            "published, from random keys."
        ),
    ] = True
    layers: Layers = None


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [
        Point(
            form="softmax",
            insertion="parallel",
            on=["attention", "cross_attention"] if settings.cross else ["attention"],
            layers=settings.layers,
            size=settings.length,
            gate=settings.gate,
            shift=not settings.gate,
        )
    ]
