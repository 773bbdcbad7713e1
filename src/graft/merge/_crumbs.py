"""The middle of a task vector by magnitude, without its largest and its smallest values."""

from __future__ import annotations

from torch import Tensor

from graft.merge._deltas import Sparse
from graft.merge._select import largest
from graft.merge.breadcrumbs import BreadcrumbsSettings
from graft.merge.stream import Piece, Tensors


def crumbs(tensors: Tensors, settings: BreadcrumbsSettings) -> Sparse:
    """Deltas in which all is 0 but the middle. All of it is kept where the density is 1."""
    sizes = [
        middle(density, gamma, tensors.count)
        for density, gamma in zip(settings.densities, settings.gammas, strict=True)
    ]

    def twice(piece: Piece) -> list[Tensor]:
        return [values for delta in piece.deltas() for values in [delta.abs_()] * 2]

    found = largest([tensors], twice, [count for top, kept in sizes for count in (top, top + kept)])
    cuts = [cut for (cut,) in found]

    def sparse(piece: Piece) -> list[Tensor]:
        made = []
        for model, delta in enumerate(piece.deltas()):
            outliers, rest = cuts[2 * model], cuts[2 * model + 1]
            # what is above the lower cut, less what is above the upper one
            above = rest.shrink(delta, piece.start)
            made.append(above.sub_(outliers.shrink(above.clone(), piece.start)))
        return made

    return sparse


def middle(density: float, gamma: float, count: int) -> tuple[int, int]:
    """(largest values that are dropped, values that are kept) of `count`."""
    if density >= 1:
        return 0, count
    kept = int(density * count)
    return min(int(gamma * count), count - kept), kept
