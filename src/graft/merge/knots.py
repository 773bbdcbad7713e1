"""KnOTS: task vectors of low rank are brought into one space by a joint decomposition and merged there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from graft.merge._layers import prepare_layers
from graft.merge._options import SubspaceSettings
from graft.merge.settings import SparseSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Tensors


prepare = prepare_layers


class Settings(SubspaceSettings, SparseSettings):
    """`θ₀ + λ U merge(Σ V_1, …)` with `[δ_1 … δ_n] = U Σ [V_1 … V_n]` for linear layers: task vectors of adapters,
    which lie in different low-rank spaces, meet in U. Other tensors: the weighted mean (or sum) of the task vectors."""

    method: Literal["knots"] = "knots"
    merge: Annotated[
        Literal["linear", "ties", "dare_linear", "dare_ties"],
        Field(description="How the parts `Σ V_m` are merged; `linear` does what task arithmetic does."),
    ] = "ties"
    normalise: Annotated[bool, Field(description="Divide by the weights that take part.")] = True


def aligned(deltas: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(U [out, r], Σ V_m [r, in] of each) of task vectors, each [out, in] float32.

    Stoica et al. 2025, arXiv:2410.19735, equation 3; the singular values stay with V, as in its experiments.
    """
    import torch

    from graft.merge._whole import svd

    u, s, v = svd(torch.cat(list(deltas), dim=1))
    wide = deltas[0].shape[1]
    return u, [s[:, None] * v[:, place * wide : (place + 1) * wide] for place in range(len(deltas))]


def largest(values: Tensor, density: float) -> Tensor:
    """`values` with zeros where the magnitude is not among the largest; of equal ones the first are kept."""
    from graft.merge._deltas import kept

    flat = values.flatten()
    count = kept(density, len(flat))
    if count >= len(flat):
        return values
    magnitude = flat.abs()
    threshold = magnitude.kthvalue(len(flat) - count + 1).values
    mask = magnitude > threshold
    mask[(magnitude == threshold).nonzero()[: count - int(mask.sum()), 0]] = True
    return (flat * mask).view_as(values)


def sparsened(parts: Sequence[Tensor], tensors: Tensors, settings: Settings) -> list[Tensor]:
    """The parts after trimming (`ties`), random dropping (`dare_*`) or nothing (`linear`)."""
    import torch

    from graft.merge._random import below

    if settings.merge == "linear":
        return list(parts)
    if settings.merge == "ties":
        return [largest(part, density) for part, density in zip(parts, settings.densities, strict=True)]
    thin = []
    for part, source, share in zip(parts, tensors.models, settings.densities, strict=True):
        keep = below(tensors.seed, tensors.name, source.drawn_by, 0, part.numel(), share) if share < 1 else True
        mask = torch.as_tensor(keep, device=part.device).expand(part.numel()).view_as(part)
        thin.append(part * mask / share)
    return thin


def joint(deltas: Sequence[Tensor], tensors: Tensors, settings: Settings) -> Tensor:
    """The merged task vector [out, in] float32 of (unweighted) task vectors."""
    from graft.merge._deltas import elected, summed

    u, parts = aligned(deltas)
    together: Any = elected if settings.merge.endswith("ties") else summed
    return u @ together(sparsened(parts, tensors, settings), settings.weights, settings.normalise)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """One matrix at a time, whole."""
    from graft.merge._deltas import summed
    from graft.merge._whole import by_matrix

    return by_matrix(
        tensors,
        settings,
        settings.scale,
        lambda deltas: joint(deltas, tensors, settings),
        lambda deltas: summed(deltas, settings.weights, settings.normalise),
    )
