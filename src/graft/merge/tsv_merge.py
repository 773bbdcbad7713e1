"""TSV-Merge: the strongest singular directions of each task vector, turned until they are orthogonal."""

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
    """`θ₀ + λ U⊥ Σ V⊥`: of each task vector of a linear layer the first 1/n of its singular components are taken,
    their left and right vectors put side by side and made orthogonal. Other tensors: the mean of the task vectors."""

    method: Literal["tsv_merge"] = "tsv_merge"


def decorrelated(deltas: Sequence[Tensor]) -> Tensor:
    """`U⊥ diag(S) V⊥` of n task vectors, each [out, in] float32; so is the result.

    U [out, k n], S and V are the k = min(out, in) // n strongest components of each; `⊥` is the orthogonal factor of
    the polar decomposition. Components that are zero are left out: they would turn the others for nothing. Gargiulo et
    al. 2025, arXiv:2412.00081, algorithm 1.
    """
    import torch

    from graft.merge._whole import recombined, svd

    rank = max(min(deltas[0].shape) // len(deltas), 1)
    parts = [(u[:, :rank], s[:rank], v[:rank]) for u, s, v in map(svd, deltas)]
    if not sum(len(s) for _, s, _ in parts):
        return torch.zeros_like(deltas[0])
    u, s, v = recombined(parts)
    return (u * s) @ v


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """One matrix at a time, whole."""
    from graft.merge._whole import subspace

    return subspace(tensors, settings, decorrelated)
