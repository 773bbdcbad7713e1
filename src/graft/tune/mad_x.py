"""The language adapter of MAD-X: one after the feed-forward, and one in the embeddings that is undone before the head
(Pfeiffer et al. 2020, arXiv:2005.00052)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Point
from graft.tune._points import Bottleneck, bottleneck


class Settings(Bottleneck):
    """A bottleneck behind the feed-forward and an invertible adapter; a task's adapter is stacked on top of it."""

    coupling: Annotated[int, Field(ge=1, description="Channels of the invertible adapter's bottlenecks.")] = 32


def points(settings: Settings) -> list[Point]:
    """The two points of the design space that these settings name."""
    undone = Point(form="invertible", on=["embeddings"], size=settings.coupling, nonlinearity=settings.nonlinearity)
    return [undone, bottleneck(settings, "after", ["feed_forward"])]
