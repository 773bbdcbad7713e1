"""Iso-CTS: as Iso-C, with the weakest common directions replaced by what each task vector has beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge._layers import prepare_layers
from graft.merge._options import SubspaceSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Tensors


prepare = prepare_layers


class Settings(SubspaceSettings):
    """`θ₀ + λ σ̄ U⊥ V⊥`: the strongest common directions of the sum of the task vectors, beside the strongest of each
    task vector outside of these, made orthogonal and equally strong. Other tensors: the mean of the task vectors."""

    method: Literal["iso_cts"] = "iso_cts"
    common: Annotated[
        float, Field(gt=0, le=1, description="Share of the directions that come from the sum of the task vectors.")
    ] = 0.8


def isotropic_with_tasks(deltas: Sequence[Tensor], common: float) -> Tensor:
    """`mean(σ) U⊥ V⊥` of n task vectors, each [out, in] float32; so is the result.

    With r = min(out, in): about `common` r components (U, σ, V) of the sum, and of each task vector projected off that
    U its (r - `common` r) / n strongest. Marczak et al. 2025, arXiv:2502.04959, algorithm 1.
    """
    import torch

    from graft.merge._whole import recombined, svd

    count, whole = len(deltas), min(deltas[0].shape)
    each = round((whole - int(whole * common)) / count)
    shared = max(whole - each * count, 1)
    u, s, v = (part[..., :shared] if i < 2 else part[:shared] for i, part in enumerate(svd(sum(deltas[1:], deltas[0]))))
    parts = [(u, s, v)]
    for delta in deltas:
        own = svd(delta - u @ (u.T @ delta))
        parts.append((own[0][:, :each], own[1][:each], own[2][:each]))
    if not sum(len(part[1]) for part in parts):
        return torch.zeros_like(deltas[0])
    left, strengths, right = recombined(parts)
    return (left @ right).mul_(strengths.mean())


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """One matrix at a time, whole."""
    from graft.merge._whole import subspace

    return subspace(tensors, settings, lambda deltas: isotropic_with_tasks(deltas, settings.common))
