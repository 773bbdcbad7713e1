"""One adapter in every block, after the feed-forward (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from graft.adapters.point import Point
from graft.tune._points import Bottleneck, bottleneck


class Settings(Bottleneck):
    """h + up(f(down(h))) behind the feed-forward, before the residual connection."""


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [bottleneck(settings, "after", ["feed_forward"])]
