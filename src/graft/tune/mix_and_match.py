"""The mix-and-match adapter: a short prefix and a wide parallel adapter (He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from graft.adapters.point import Point
from graft.tune._points import Bottleneck, Keys, Scale, bottleneck, keys


class Settings(Bottleneck, Keys):
    """Prefix tuning in attention, a scaled parallel adapter in the feed-forward."""

    scale: Scale = 4.0


def points(settings: Settings) -> list[Point]:
    """The two points of the design space that these settings name."""
    wide = bottleneck(settings, "parallel", ["feed_forward"], composition="scaled", scale=settings.scale)
    return [keys(settings, ["attention"]), wide]
