"""Model Breadcrumbs: of every task vector the largest and the smallest values are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from graft.merge.settings import PerModel, SparseSettings

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors


USUAL = 0.01
"""The γ that is taken where none is given."""
ROUNDING = 1e-9
"""By so much two shares that a search or a gradient worked out may exceed the whole."""


class BreadcrumbsSettings(SparseSettings):
    """A base plus task vectors without outliers and without what is small."""

    gamma: Annotated[
        PerModel | None,
        Field(description="Share of the largest values that is dropped; none: 0.01, or what the density leaves."),
    ] = None

    @property
    def gammas(self) -> list[float]:
        """One γ a model."""
        if self.gamma is None:
            return [min(USUAL, 1 - density) for density in self.densities]
        return self.each(self.gamma)

    @model_validator(mode="after")
    def _outliers(self) -> BreadcrumbsSettings:
        for density, gamma in zip(self.densities, self.gammas, strict=True):
            if not 0 <= gamma < 1:
                raise ValueError(f"expected gamma from 0 and below 1, found {gamma}")
            if density + gamma > 1 + ROUNDING:
                raise ValueError(
                    f"expected a density and a gamma of at most 1 together, found {density} and {gamma}: what is kept "
                    "and what is dropped for its size are shares of the same values"
                )
        return self


class Settings(BreadcrumbsSettings):
    """`θ₀ + λ sum_m w_m δ̂_m`: of each δ the share γ of the largest values and what is left beyond the density is 0."""

    method: Literal["breadcrumbs"] = "breadcrumbs"


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Both thresholds are measured first, exactly; then element by element.

    Davari and Belilovsky 2024, arXiv:2312.06795.
    """
    from graft.merge._crumbs import crumbs
    from graft.merge._deltas import combine

    return combine(settings, crumbs(tensors, settings), elect=False)
