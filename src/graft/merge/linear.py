"""Weighted mean of the weights (a soup)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from graft.merge.settings import MergeSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.stream import Combine, Tensors


class Settings(MergeSettings):
    """The weighted mean: `sum_m w_m θ_m`, the weights made to sum to one."""

    method: Literal["linear"] = "linear"
    normalise: Annotated[bool, Field(description="Divide the weights by their sum.")] = True

    @model_validator(mode="after")
    def _can_be_normalised(self) -> Settings:
        if self.normalise and abs(sum(self.weights)) < 1e-9:
            raise ValueError("expected weights whose sum is not 0, or `normalise: false`")
        return self


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
    whole = sum(settings.weights) if settings.normalise else 1.0
    weights = [weight / whole for weight in settings.weights]
    return lambda piece: weighted_sum(piece.models, weights)
