"""A parallel adapter whose change is scaled (He et al. 2022, arXiv:2110.04366, section 4.6)."""

from __future__ import annotations

from graft.adapters.point import Point
from graft.tune._points import Bottleneck, Scale, Sublayers, bottleneck


class Settings(Bottleneck):
    """h + s · up(f(down(x))), x being what the sublayer reads; the paper's best s is 4."""

    scale: Scale = 4.0
    on: Sublayers = ["feed_forward"]


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [bottleneck(settings, "parallel", settings.on, composition="scaled", scale=settings.scale)]
