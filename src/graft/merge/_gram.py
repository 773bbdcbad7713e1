"""Means on a sphere: every one of them is a sum of its inputs, whose factors follow from inner products alone.

One pass over a tensor gives the inner products of all inputs (their Gram matrix); the factors are then found with
numbers, whatever the size of the tensor, and a second pass adds the inputs up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graft.merge.stream import Combine, Piece, Tensors


def gram(tensors: Tensors) -> np.ndarray:
    """[m, m] float64: inner products of the models, or of their deltas where there is a base."""

    def products(piece: Piece) -> list[float]:
        values = vectors(piece)
        return [float(torch.dot(a, b)) for i, a in enumerate(values) for b in values[: i + 1]]

    size = len(tensors.models)
    made = np.zeros((size, size))
    made[np.tril_indices(size)] = np.sum(tensors.map(products), axis=0)
    return made + np.tril(made, -1).T


def vectors(piece: Piece) -> list[Tensor]:
    """The deltas where there is a base, else the models."""
    return piece.models if piece.base is None else piece.deltas()


def add_up(factors: Sequence[float]) -> Combine:
    """`sum_m f_m θ_m`, or base plus `sum_m f_m δ_m`."""

    def make(piece: Piece) -> Tensor:
        first, *others = vectors(piece)
        total = first.mul_(factors[0])
        for other, factor in zip(others, factors[1:], strict=True):
            total.add_(other, alpha=factor)
        return total if piece.base is None else total.add_(piece.base)

    return make


def lengths(gram_mm: np.ndarray) -> np.ndarray:
    """[m] float64: norms of the inputs."""
    return np.sqrt(np.clip(np.diag(gram_mm), 0, None))


def cosines(gram_mm: np.ndarray) -> np.ndarray:
    """[m, m] float64: inner products of the inputs made of length 1; 0 for an input that is zero."""
    norms = lengths(gram_mm)
    safe = np.where(norms > 0, norms, 1.0)
    return np.clip(gram_mm / safe[:, None] / safe[None, :], -1, 1)
