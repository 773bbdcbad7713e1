"""BitFit: only the biases are trained (Ben Zaken et al. 2022, arXiv:2106.10199)."""

from __future__ import annotations

from graft.adapters.point import Layers, Point
from graft.settings import Settings as Base


class Settings(Base):
    """A change of every bias of linear layers and norms. Folds into them; needs a model that has biases."""

    layers: Layers = None


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [
        Point(
            form="bias",
            insertion="after",
            on=["biases"],
            layers=settings.layers,
        )
    ]
