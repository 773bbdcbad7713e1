"""Model Breadcrumbs: of every task vector the largest and the smallest values are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from graft.merge.settings import PerModel, SparseSettings

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors


class BreadcrumbsSettings(SparseSettings):
    """A base plus task vectors without outliers and without what is small."""

    gamma: Annotated[
        PerModel,
        Field(description="Share of the largest values that is dropped; less where the density would not be reached."),
    ] = 0.01

    @property
    def gammas(self) -> list[float]:
        """One γ a model."""
        return self.each(self.gamma)

    @model_validator(mode="after")
    def _outliers(self) -> BreadcrumbsSettings:
        if wrong := [g for g in self.gammas if not 0 <= g < 1]:
            raise ValueError(f"expected gamma from 0 and below 1, found {wrong[0]}")
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
