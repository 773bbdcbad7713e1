"""Iso-C: the sum of the task vectors, all its singular directions made equally strong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from graft.merge._layers import prepare_layers
from graft.merge._options import SubspaceSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Tensors


prepare = prepare_layers


class Settings(SubspaceSettings):
    """`θ₀ + λ σ̄ U V` with `sum_m w_m δ_m = U diag(σ) V` for linear layers. Other tensors: the mean of the task
    vectors."""

    method: Literal["iso_c"] = "iso_c"


def isotropic(deltas: Sequence[Tensor]) -> Tensor:
    """`mean(σ) U V` of the sum of task vectors, each [out, in] float32; so is the result.

    The mean is over the singular values that are not zero. Marczak et al. 2025, arXiv:2502.04959, equation 6.
    """
    from graft.merge._whole import svd

    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    u, s, v = svd(total)
    return (u @ v).mul_(s.mean()) if len(s) else total


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """One matrix at a time, whole."""
    from graft.merge._whole import subspace

    return subspace(tensors, settings, isotropic)
