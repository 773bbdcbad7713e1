"""What methods on task vectors share: how many values to keep, and how sparse deltas come together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graft.merge import _fused
from graft.merge.settings import SparseSettings
from graft.merge.stream import Combine, Piece, Tensors

if TYPE_CHECKING:
    from torch import Tensor

Sparse = Callable[[Piece], "list[Tensor]"]
"""The deltas of a piece, after a method has dropped and rescaled what it wants to."""


@dataclass(frozen=True)
class Thinned:
    """What a method does to the deltas of a piece, and how a kernel is told to do the same."""

    plain: Sparse
    dropping: _fused.Dropping

    def __call__(self, piece: Piece) -> list[Tensor]:
        """The plain way."""
        return self.plain(piece)


def kept(density: float, count: int) -> int:
    """How many of `count` values a density keeps: at least one, like mergekit."""
    return count if density >= 1 else max(int(density * count), 1)


def magnitudes(piece: Piece) -> list[Tensor]:
    """|δ| of every model."""
    return [delta.abs_() for delta in piece.deltas()]


def summed(deltas: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """`sum_m w_m δ_m`, divided by `sum_m w_m` where asked; overwrites the first."""
    total = deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total.div_(_divisor(weights, normalise))


def _divisor(weights: Sequence[float], normalise: bool) -> float:
    whole = sum(weights)
    return whole if normalise and abs(whole) >= 1e-8 else 1.0


def elected(deltas: Sequence[Tensor], weights: Sequence[float], normalise: bool, sign: Tensor | None = None) -> Tensor:
    """Sum of the weighted deltas that have, element by element, the elected sign.

    That is the sign of their weighted sum (0 counts as +), or `sign` where it is given. Divided, where asked, by the
    weights of those that agree (the disjoint mean of TIES). Overwrites the deltas.
    """
    import torch

    weighted = [d.mul_(w) if w != 1 else d for d, w in zip(deltas, weights, strict=True)]
    sign = majority(weighted) if sign is None else sign
    agreeing, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(weighted, weights, strict=True):
        same = delta.mul_(sign).clamp_(min=0)
        agreeing.add_(same)
        if normalise:
            share.add_(same.sign_(), alpha=weight)
    agreeing.mul_(sign)
    if not normalise:
        return agreeing
    if min(weights) > 0:
        # nothing agrees only where all deltas are zero: the sum is zero there as well
        return agreeing.div_(share.clamp_(min=min(weights)))
    return agreeing.div_(share.masked_fill_(share == 0, 1.0))


def majority(deltas: Sequence[Tensor]) -> Tensor:
    """−1 where the sum is below zero, else +1; float32."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    # sign(2 sign(x) + 1): −1 below zero, +1 at zero and above
    return total.sign_().mul_(2).add_(1).sign_()


def combine(settings: SparseSettings, sparse: Sparse, *, elect: bool) -> Combine:
    """Base plus λ times the combined sparse deltas."""
    together, weights = elected if elect else summed, settings.weights

    def make(piece: Piece) -> Tensor:
        mixed = together(sparse(piece), weights, settings.normalise)
        assert piece.base is not None
        return piece.base.add(mixed, alpha=settings.scale)

    if not isinstance(sparse, Thinned):
        return make
    by_kernel = _fused.deltas(
        weights,
        scale=settings.scale,
        divisor=_divisor(weights, settings.normalise and not elect),
        elect=elect,
        normalise=settings.normalise,
        dropping=sparse.dropping,
    )
    return _fused.Fused(make, by_kernel)


def rescaling(tensors: Tensors, sparse: Sparse) -> list[float]:
    """The factor, for each model, that gives its sparse delta the L1 norm of the full one (1 where one is near 0)."""

    import torch

    def norms(piece: Piece) -> list[tuple[float, float]]:
        assert piece.base is not None
        # the deltas overwrite the models, and what is made of them may overwrite the deltas
        full = [float((m - piece.base).abs_().sum(dtype=torch.float64)) for m in piece.models]
        thin = [float(d.abs().sum(dtype=torch.float64)) for d in sparse(piece)]
        return list(zip(full, thin, strict=True))

    sums = torch.tensor(tensors.map(norms), dtype=torch.float64).sum(dim=0)
    return [full / thin if min(full, thin) >= 1e-7 else 1.0 for full, thin in sums.tolist()]
