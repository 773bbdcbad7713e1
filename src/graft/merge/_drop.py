"""Deltas of which elements are dropped at random, all with one probability or the small ones more often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graft.merge._deltas import Sparse, rescaling
from graft.merge._random import uniform
from graft.merge.stream import Piece, Tensors

SORTED = 1 << 16
"""Elements of the rows that are sorted together."""
Mask = Callable[[int, Tensor, int], Tensor]
"""(model, its delta, first element) → float32 factors, 0 where an element is dropped."""


def dropped(tensors: Tensors, densities: Sequence[float], rescale: str) -> Sparse:
    """DARE: each element is kept with the probability that is its model's density.

    `rescale` divides what is kept by that probability, restores the L1 norm of the tensor, or does nothing.
    """

    def factors(model: int, delta: Tensor, start: int) -> Tensor:
        share = densities[model]
        if share >= 1:
            return torch.ones_like(delta)
        drawn = uniform(tensors.seed, tensors.name, tensors.models[model].model, start, len(delta))
        mask = torch.from_numpy(drawn < np.uint32(round(share * 2**32))).to(delta)
        return mask.div_(share) if rescale == "probability" else mask

    return _masked(tensors, factors, rescale)


def dropped_by_rank(tensors: Tensors, densities: Sequence[float], epsilons: Sequence[float], rescale: str) -> Sparse:
    """DELLA: in each row the probability to be kept grows with the rank of |δ|, from density − ε to density + ε.

    `tensors` must come by rows. `rescale` divides each element by its own probability, restores the L1 norm of the
    tensor, or does nothing.
    """

    ranks = [_Ranks.of(tensors.row, density, epsilon) for density, epsilon in zip(densities, epsilons, strict=True)]

    def factors(model: int, delta: Tensor, start: int) -> Tensor:
        if densities[model] >= 1:
            return torch.ones_like(delta)
        rows = delta.view(-1, tensors.row)
        drawn = uniform(tensors.seed, tensors.name, tensors.models[model].model, start, len(delta)).reshape(rows.shape)
        near, made = tensors.workers.near, torch.empty_like(rows)
        # a sort needs several times the memory of what it sorts
        several = max(SORTED // tensors.row, 1) if near else len(rows)
        for first in range(0, len(rows), several):
            some = slice(first, first + several)
            mask = torch.from_numpy(drawn[some] < ranks[model].limits).to(delta)
            if rescale == "probability":
                mask.mul_(ranks[model].inverses.to(delta.device))
            made[some].scatter_(1, _order(rows[some], near), mask)
        return made.view(-1)

    return _masked(tensors, factors, rescale)


@dataclass(frozen=True)
class _Ranks:
    """Of each rank in a row of so many columns, smallest magnitude first."""

    limits: np.ndarray
    """uint32: a draw below it keeps the element."""
    inverses: Tensor
    """float32: one over the probability to be kept."""

    @classmethod
    def of(cls, columns: int, density: float, epsilon: float) -> _Ranks:
        rank = np.arange(columns) / (columns - 1) if columns > 1 else np.full(columns, 0.5)
        shares = density - epsilon + 2 * epsilon * rank
        limits = np.minimum(np.round(shares * 2**32), 2**32 - 1).astype(np.uint32)
        return cls(limits, torch.from_numpy((1 / shares).astype(np.float32)))


def _order(rows: Tensor, near: bool) -> Tensor:
    """[rows, columns] int64: the columns of every row by growing magnitude, equal ones by place."""
    if not near:
        return rows.abs().sort(dim=1, stable=True).indices
    # the bits of a positive float order like the float: with the column below them one sort of whole numbers does it
    packed = (rows.abs().view(torch.int32).to(torch.int64) << 32).add_(torch.arange(rows.shape[1]))
    return torch.from_numpy(np.sort(packed.numpy(), axis=1) & 0xFFFFFFFF)


def _masked(tensors: Tensors, factors: Mask, rescale: str) -> Sparse:
    def sparse(piece: Piece) -> list[Tensor]:
        return [delta.mul_(factors(model, delta, piece.start)) for model, delta in enumerate(piece.deltas())]

    if rescale != "l1":
        return sparse
    whole = rescaling(tensors, sparse)

    def rescaled(piece: Piece) -> list[Tensor]:
        return [delta.mul_(factor) for delta, factor in zip(sparse(piece), whole, strict=True)]

    return rescaled
