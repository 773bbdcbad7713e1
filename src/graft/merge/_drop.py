"""Deltas of which elements are dropped at random, all with one probability or the small ones more often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graft.merge._deltas import Sparse, Thinned, rescaling
from graft.merge._fused import Dropping
from graft.merge._random import key, uniform
from graft.merge.stream import Piece, Tensors

if TYPE_CHECKING:
    from torch import Tensor

SORTED = 1 << 16
"""Elements of the rows that are sorted together."""
Mask = Callable[[int, "Tensor", int], "Tensor"]
"""(model, its delta, first element) → float32 factors, 0 where an element is dropped."""


def dropped(tensors: Tensors, densities: Sequence[float], rescale: str) -> Sparse:
    """DARE: each element is kept with the probability that is its model's density.

    `rescale` divides what is kept by that probability, restores the L1 norm of the tensor, or does nothing.
    """

    limits = [np.array([_limit(share)], np.uint32) for share in densities]
    gains = [np.array([_gain(share, rescale)], np.float32) for share in densities]

    def factors(model: int, delta: Tensor, start: int) -> Tensor:
        import torch

        if densities[model] >= 1:
            return torch.ones_like(delta)
        drawn = uniform(tensors.seed, tensors.name, tensors.models[model].drawn_by, start, len(delta))
        return torch.from_numpy(drawn < limits[model]).to(delta).mul_(float(gains[model][0]))

    return _masked(tensors, factors, rescale, limits, gains)


def _limit(share: float) -> int:
    return min(round(share * 2**32), 2**32 - 1)


def _gain(share: float, rescale: str) -> np.float32:
    """Of what is kept; 0 says that everything is (see `Dropping`)."""
    if share >= 1:
        return np.float32(0)
    return np.float32(1) / np.float32(share) if rescale == "probability" else np.float32(1)


def dropped_by_rank(tensors: Tensors, densities: Sequence[float], epsilons: Sequence[float], rescale: str) -> Sparse:
    """DELLA: in each row the probability to be kept grows with the rank of |δ|, from density − ε to density + ε.

    `tensors` must come by rows. `rescale` divides each element by its own probability, restores the L1 norm of the
    tensor, or does nothing.
    """

    ranks = [
        _Ranks.of(tensors.row, density, epsilon, rescale) for density, epsilon in zip(densities, epsilons, strict=True)
    ]

    def factors(model: int, delta: Tensor, start: int) -> Tensor:
        import torch

        if densities[model] >= 1:
            return torch.ones_like(delta)
        rows = delta.view(-1, tensors.row)
        drawn = uniform(tensors.seed, tensors.name, tensors.models[model].drawn_by, start, len(delta))
        drawn = drawn.reshape(rows.shape)
        near, made = tensors.workers.near, torch.empty_like(rows)
        # a sort needs several times the memory of what it sorts
        several = max(SORTED // tensors.row, 1) if near else len(rows)
        for first in range(0, len(rows), several):
            some = slice(first, first + several)
            mask = torch.from_numpy(drawn[some] < ranks[model].limits).to(delta)
            mask.mul_(torch.from_numpy(ranks[model].gains).to(delta.device))
            made[some].scatter_(1, _order(rows[some], near), mask)
        return made.view(-1)

    return _masked(tensors, factors, rescale, [each.limits for each in ranks], [each.gains for each in ranks])


@dataclass(frozen=True)
class _Ranks:
    """Of each rank in a row of so many columns, smallest magnitude first."""

    limits: np.ndarray
    """uint32: a draw below it keeps the element."""
    gains: np.ndarray
    """float32: factor of what is kept; zeros where everything is."""

    @classmethod
    def of(cls, columns: int, density: float, epsilon: float, rescale: str) -> _Ranks:
        if density >= 1:
            return cls(np.zeros(columns, np.uint32), np.zeros(columns, np.float32))
        rank = np.arange(columns) / (columns - 1) if columns > 1 else np.full(columns, 0.5)
        shares = density - epsilon + 2 * epsilon * rank
        limits = np.minimum(np.round(shares * 2**32), 2**32 - 1).astype(np.uint32)
        gains = (1 / shares if rescale == "probability" else np.ones(columns)).astype(np.float32)
        return cls(limits, gains)


def _order(rows: Tensor, near: bool) -> Tensor:
    """[rows, columns] int64: the columns of every row by growing magnitude, equal ones by place."""
    import torch

    if not near:
        return rows.abs().sort(dim=1, stable=True).indices
    # the bits of a positive float order like the float: with the column below them one sort of whole numbers does it
    packed = (rows.abs().view(torch.int32).to(torch.int64) << 32).add_(torch.arange(rows.shape[1]))
    return torch.from_numpy(np.sort(packed.numpy(), axis=1) & 0xFFFFFFFF)


def _masked(
    tensors: Tensors, factors: Mask, rescale: str, limits: Sequence[np.ndarray], gains: Sequence[np.ndarray]
) -> Sparse:
    def sparse(piece: Piece) -> list[Tensor]:
        return [delta.mul_(factors(model, delta, piece.start)) for model, delta in enumerate(piece.deltas())]

    if rescale != "l1":
        keys = [key(tensors.seed, tensors.name, source.drawn_by) for source in tensors.models]
        return Thinned(sparse, Dropping.at_random(keys, limits, gains))
    whole = rescaling(tensors, sparse)

    def rescaled(piece: Piece) -> list[Tensor]:
        return [delta.mul_(factor) for delta, factor in zip(sparse(piece), whole, strict=True)]

    return rescaled
