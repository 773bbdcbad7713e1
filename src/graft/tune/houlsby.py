"""Adapters after attention and after the feed-forward of every block (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Point
from graft.tune._points import Bottleneck, bottleneck


class Settings(Bottleneck):
    """h + up(f(down(h))) behind both sublayers, before the residual connection."""

    width: Annotated[int, Field(ge=1, description="Channels of the bottleneck.")] = 32


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [bottleneck(settings, "after", ["attention", "feed_forward"])]
