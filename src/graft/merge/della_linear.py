"""DELLA without the election: drop by rank of magnitude, rescale, add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.merge.settings import PerModel, SparseSettings

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors


class DellaSettings(SparseSettings):
    """A base plus task vectors of which small elements are dropped more often than large ones."""

    draws: ClassVar[bool] = True
    epsilon: Annotated[
        PerModel, Field(description="The probability to be kept lies between density − ε and density + ε.")
    ] = 0.15
    rescale: Annotated[
        Literal["probability", "l1", "none"],
        Field(description="Divide each element by its own probability (the paper), or restore the L1 norm (mergekit)."),
    ] = "probability"

    @property
    def epsilons(self) -> list[float]:
        """One ε a model."""
        return self.each(self.epsilon)

    @model_validator(mode="after")
    def _probabilities(self) -> DellaSettings:
        for density, epsilon in zip(self.densities, self.epsilons, strict=True):
            if density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
                raise ValueError(f"expected density ± epsilon inside (0, 1), found {density} ± {epsilon}")
        return self

    @property
    def in_float64(self) -> bool:
        """The sums that norms are made of."""
        return self.rescale == "l1"


class Settings(DellaSettings):
    """`θ₀ + λ sum_m w_m δ̂_m`: in every row the share that is kept grows with the rank of |δ|."""

    method: Literal["della_linear"] = "della_linear"


def by_rows(settings: Any) -> bool:
    """Ranks are taken in a row."""
    return True


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Row by row; the L1 norm, where asked for, is measured first.

    Deep et al. 2024, arXiv:2406.11617.
    """
    from graft.merge._deltas import combine
    from graft.merge._drop import dropped_by_rank

    sparse = dropped_by_rank(tensors, settings.densities, settings.epsilons, settings.rescale)
    return combine(settings, sparse, elect=False)
