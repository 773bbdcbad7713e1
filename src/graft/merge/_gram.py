"""Means on a sphere: every one of them is a sum of its inputs, whose factors follow from inner products alone.

One pass over a tensor gives the inner products of all inputs (their Gram matrix); the factors are then found with
numbers, whatever the size of the tensor, and a second pass adds the inputs up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from graft.merge import _fused
from graft.merge._blocks import LANES
from graft.merge._workers import TOGETHER

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Bits, Combine, Piece, Tensors


def gram(tensors: Tensors) -> np.ndarray:
    """[m, m] float64: inner products of the models, or of their deltas where there is a base."""

    def products(span: tuple[int, int]) -> np.ndarray:
        bits = tensors.bits(*span)
        found = _fused.inner_products(bits) if bits is not None else None
        return _plainly(vectors(tensors.read(*span)), tensors.workers.near) if found is None else found

    size = len(tensors.models)
    made = np.zeros((size, size))
    made[np.tril_indices(size)] = np.sum(tensors.workers.map(products, tensors.spans(), TOGETHER), axis=0).sum(axis=1)
    return made + np.tril(made, -1).T


def _plainly(values: Sequence[Tensor], near: bool) -> np.ndarray:
    """[m (m + 1) / 2, LANES] float64: the sums of `_fused.inner_products`; to the last bit, where `near`."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[: i + 1]]
    if not near:
        return np.array([[float(a.dot(b))] for a, b in pairs])
    return np.stack([_in_lanes(a.double().mul(b.double()).numpy()) for a, b in pairs])


def _in_lanes(products: np.ndarray) -> np.ndarray:
    return np.pad(products, (0, -len(products) % LANES)).reshape(-1, LANES).sum(axis=0)


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

    def by_kernel(bits: Bits, made: str, out: np.ndarray) -> bool:
        return (with_base if bits.base else without)(bits, made, out)

    with_base, without = _fused.deltas(factors), _fused.weighted_sum(factors)
    return _fused.Fused(make, by_kernel)


def lengths(gram_mm: np.ndarray) -> np.ndarray:
    """[m] float64: norms of the inputs."""
    return np.sqrt(np.clip(np.diag(gram_mm), 0, None))


def cosines(gram_mm: np.ndarray) -> np.ndarray:
    """[m, m] float64: inner products of the inputs made of length 1; 0 for an input that is zero."""
    norms = lengths(gram_mm)
    safe = np.where(norms > 0, norms, 1.0)
    return np.clip(gram_mm / safe[:, None] / safe[None, :], -1, 1)
