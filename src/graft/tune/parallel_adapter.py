"""An adapter beside a sublayer instead of after it (He et al. 2022, arXiv:2110.04366, section 3.3)."""

from __future__ import annotations

from graft.adapters.point import Point
from graft.tune._points import Bottleneck, Sublayers, bottleneck


class Settings(Bottleneck):
    """h + up(f(down(x))), x being what the sublayer reads."""

    on: Sublayers = ["feed_forward"]


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [bottleneck(settings, "parallel", settings.on)]
