"""Matrices as products of two thin ones: the best of a rank, and what is lost by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """`b` [out, r] times `a` [r, in], float32, and the error of the product relative to what it stands for.

    Both lie in this machine's memory, wherever they were worked out.
    """

    a: Tensor
    b: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Columns of `b`."""
        return self.a.shape[0]


def concatenated(pairs: list[Pair]) -> Pair:
    """The sum of products as one product, exactly: factors side by side. Its rank is the sum of the ranks."""
    return Pair(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs], dim=1))


def refactored(pair: Pair, rank: int | None, energy: float | None) -> Pair:
    """The best product of fewer columns (Eckart and Young 1936), from the factors alone; float64 inside.

    With B = Q_b R_b and Aᵀ = Q_a R_a the singular values of B A are those of the small matrix R_b R_aᵀ.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return _cut(q_b @ u, s, vh @ q_a.T, float(s.square().sum()), rank, energy)


def factored(matrix: Tensor, rank: int | None, energy: float | None) -> Pair:
    """The best product of few columns for a matrix [out, in]; by the Gram matrix of its shorter side, in float64."""
    wide = matrix.double()
    turned = wide.shape[0] > wide.shape[1]
    short = wide.T if turned else wide
    values, vectors = torch.linalg.eigh(short @ short.T)
    s = values.flip(0).clamp(min=0).sqrt()
    left = vectors.flip(1)
    # s Vᵀ = Uᵀ M: no division by singular values that may be 0
    right = (left.T @ short) / s.clamp(min=1e-300)[:, None]
    right = torch.where(s[:, None] > s[0] * 1e-12, right, torch.zeros_like(right)) if s[0] > 0 else right * 0
    whole = float(wide.square().sum())
    return _cut(right.T, s, left.T, whole, rank, energy) if turned else _cut(left, s, right, whole, rank, energy)


def _cut(u: Tensor, s: Tensor, vh: Tensor, whole: float, rank: int | None, energy: float | None) -> Pair:
    kept = count(s, rank, energy)
    root = s[:kept].sqrt()
    error = max(1 - float(s[:kept].square().sum()) / whole, 0.0) ** 0.5 if whole > 0 else 0.0
    return Pair((root[:, None] * vh[:kept]).float().cpu(), (u[:, :kept] * root).float().cpu(), error)


def count(singular: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values (falling) are kept: at most `rank`, and no more than the share `energy` of their
    squares needs. At least one."""
    found = len(singular)
    if energy is not None:
        squares = singular.square().cumsum(0)
        found = int((squares < energy * squares[-1]).sum()) + 1 if float(squares[-1]) > 0 else 1
    return max(min(found, len(singular), rank or found), 1)
