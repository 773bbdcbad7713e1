"""Weighted mean of the weights (a soup)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from graft.merge.settings import NormalisedSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Tensors


class Settings(NormalisedSettings):
    """The weighted mean: `sum_m w_m θ_m`, the weights made to sum to one."""

    method: Literal["linear"] = "linear"


def weighted_sum(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_m w_m θ_m` over tensors of one shape, float32; the first tensor is overwritten.

    Model soups, Wortsman et al. 2022, arXiv:2203.05482.
    """
    total = models[0].mul_(weights[0])
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total.add_(model, alpha=weight)
    return total


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, nothing measured before."""
    from graft.merge import _fused

    factors = settings.factors
    return _fused.Fused(lambda piece: weighted_sum(piece.models, factors), _fused.weighted_sum(factors))
