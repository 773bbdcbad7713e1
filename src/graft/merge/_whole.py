"""Methods that need matrices whole: one tensor of all parents is held at a time, the others wait.

Memory is that of the largest matrix, float32, times (models + base), and what the method makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graft.merge._deltas import summed
from graft.merge._layers import Layers, orientation
from graft.merge._options import SubspaceSettings
from graft.merge.settings import DeltaSettings
from graft.merge.stream import Combine, Piece, Tensors

NOTHING = 1e-5
"""Singular values below this share of the largest stand for zero: differences of rounded weights have such."""


def whole(tensors: Tensors) -> tuple[Tensor | None, list[Tensor]]:
    """(base or None, models): the tensor of every parent in its shape, float32. Raises CheckpointError for NaN, Inf."""
    there = tensors.workers.device
    held = [torch.empty(tensors.shape, device=there) for _ in tensors.models]
    base = torch.empty(tensors.shape, device=there) if tensors.base is not None else None

    def take(piece: Piece) -> None:
        here = slice(piece.start, piece.start + len(piece))
        for into, values in zip(held, piece.models, strict=True):
            into.view(-1)[here] = values
        if base is not None and piece.base is not None:
            base.view(-1)[here] = piece.base

    tensors.map(take)
    return base, held


def made(tensor: Tensor) -> Combine:
    """Gives the pieces of a tensor that has been made whole."""
    flat = tensor.reshape(-1)
    return lambda piece: flat[piece.start : piece.start + len(piece)]


Together = Callable[[list[Tensor]], Tensor]
"""Makes one of several task vectors, float32, of one shape; it may overwrite them."""


def by_matrix(tensors: Tensors, settings: DeltaSettings, scale: float, merge: Together, rest: Together) -> Combine:
    """`θ₀ + λ merge([δ_1, …])` for weights of linear layers (whole, [out, in] each), `θ₀ + λ rest([δ_1, …])` otherwise
    (in pieces)."""
    layers = tensors.survey
    assert layers is None or isinstance(layers, Layers)
    turned = orientation(tensors, layers)
    if turned is None:

        def make(piece: Piece) -> Tensor:
            assert piece.base is not None
            return torch.add(piece.base, rest(piece.deltas()), alpha=scale)

        return make
    with tensors.workers.alone():
        base, models = whole(tensors)
        assert base is not None
        deltas = [model.sub_(base) for model in models]
        merged = merge([delta.T for delta in deltas] if turned else deltas)
        return made(torch.add(base, merged.T if turned else merged, alpha=scale))


def subspace(tensors: Tensors, settings: SubspaceSettings, merge: Together) -> Combine:
    """`by_matrix` with `w_m δ_m` for the task vectors, and their mean where there is no matrix."""
    weights, count = settings.weights, len(settings.weights)
    return by_matrix(
        tensors,
        settings,
        settings.scale,
        lambda deltas: merge([delta.mul_(w) for delta, w in zip(deltas, weights, strict=True)]),
        lambda deltas: summed(deltas, [w / count for w in weights], False),
    )


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U [out, r], S [r], V [r, in]` with `matrix = U diag(S) V`, float32, S falling; what stands for zero is left out.

    By the eigenvectors of the smaller Gram matrix in float64: half the time of a decomposition in float32, and as good,
    since only singular values above NOTHING of the largest are wanted.
    """
    exact = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    s = squares.flip(0).clamp_(min=0).sqrt_()
    rank = int((s > NOTHING * s[0]).sum()) if len(s) else 0
    s, vectors = s[:rank], vectors.flip(1)[:, :rank]
    other = (vectors.T @ exact) / s[:, None] if wide else (exact @ vectors) / s
    u, v = (vectors, other) if wide else (other, vectors.T)
    return u.float(), s.float(), v.float()


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows): `P Q` of the decomposition `P D Q`. Any shape, float32."""
    p, _, q = svd(matrix)
    return p @ q


def recombined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Parts (U, S, V) side by side, U and V made orthogonal: `U⊥ [out, r], S [r], V⊥ [r, in]`."""
    u = torch.cat([part[0] for part in parts], dim=1)
    v = torch.cat([part[2] for part in parts], dim=0)
    return orthogonal(u), torch.cat([part[1] for part in parts]), orthogonal(v)
