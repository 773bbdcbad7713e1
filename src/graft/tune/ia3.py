"""(IA)³: keys, values and the inner layer of the feed-forward are rescaled (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from graft.adapters.point import Layers, Point
from graft.settings import Settings as Base


class Settings(Base):
    """A factor for each channel of keys, values and the input of the feed-forward's last layer. Folds."""

    layers: Layers = None


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [
        Point(
            form="scale",
            insertion="after",
            on=["key|kv|qkv", "value|kv|qkv", "intermediate"],
            layers=settings.layers,
        )
    ]
