"""DARE: drop most of every task vector at random, rescale what is left, add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graft.merge.settings import SparseSettings

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors


class DareSettings(SparseSettings):
    """A base plus task vectors of which a share is kept at random."""

    draws: ClassVar[bool] = True
    rescale: Annotated[
        Literal["probability", "l1", "none"],
        Field(description="Divide what is kept by the density (the paper), or restore the L1 norm (as mergekit)."),
    ] = "probability"

    @property
    def in_float64(self) -> bool:
        """The sums that norms are made of."""
        return self.rescale == "l1"


class Settings(DareSettings):
    """`θ₀ + λ sum_m w_m (mask_m ∘ δ_m / p)`, each element of a mask 1 with probability p, the density."""

    method: Literal["dare_linear"] = "dare_linear"


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element; the L1 norm, where asked for, is measured first.

    Yu et al. 2024, arXiv:2311.03099.
    """
    from graft.merge._deltas import combine
    from graft.merge._drop import dropped

    return combine(settings, dropped(tensors, settings.densities, settings.rescale), elect=False)
