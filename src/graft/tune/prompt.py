"""Prompt tuning: learned embeddings in front of the text (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Point
from graft.tune._points import Gate


class Settings(Gate):
    """The model reads so many learned tokens before the text. In encoders they are read by themselves."""

    length: Annotated[int, Field(ge=1, description="Learned tokens.")] = 16


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [
        Point(
            form="tokens",
            insertion="parallel",
            on=["input"],
            size=settings.length,
            **settings.gated(),
        )
    ]
