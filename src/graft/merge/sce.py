"""SCE: select what varies between models, calculate a weight for each tensor, erase the minority's signs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import DeltaSettings
from graft.settings import ModelRef, Number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


class Settings(DeltaSettings):
    """Base plus the mean of task vectors, weighted by their squares, over the elements that vary most."""

    method: Literal["sce"] = "sce"
    models: Annotated[list[ModelRef], Field(min_length=1, description="Models; their weights follow from them.")]
    select: Annotated[
        Number, Field(gt=0, le=1, description="Share of the elements that vary between models which is kept.")
    ] = 1.0


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """`var_m δ_m` of each element, float32, over the models (not over one less)."""
    import torch

    return torch.var(torch.stack(list(deltas)), dim=0, unbiased=False)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """The variance that is enough and the weights are measured first; then element by element.

    Wan et al. 2024 (FuseChat), arXiv:2408.07990.
    """
    import numpy as np
    import torch

    from graft.merge._deltas import elected, majority
    from graft.merge._select import EVERYTHING, NOTHING, largest

    cut = EVERYTHING
    if settings.select < 1:
        varying = sum(tensors.map(lambda piece: int(torch.count_nonzero(variance(piece.deltas())))))
        count = int(varying * settings.select)
        cut = largest([tensors], lambda piece: [variance(piece.deltas())], [count])[0][0] if count else NOTHING

    def selected(piece: Piece) -> list[Tensor]:
        deltas = piece.deltas()
        if cut is EVERYTHING:
            return deltas
        mask = cut.keep(variance(deltas), piece.start).float()
        return [delta.mul_(mask) for delta in deltas]

    def squares(piece: Piece) -> list[float]:
        return [float(torch.dot(delta, delta)) for delta in selected(piece)]

    means = np.sum(tensors.map(squares), axis=0) / max(tensors.count, 1)
    weights = means / means.sum() if means.sum() >= 1e-30 else np.full(len(means), 1 / len(means))

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        deltas = selected(piece)
        return elected(deltas, weights.tolist(), True, majority(deltas)).add_(piece.base)

    return make
