"""DELLA: drop by rank of magnitude, elect a sign for every parameter, average those that agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.della_linear import DellaSettings, by_rows

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors

__all__ = ["Settings", "by_rows", "rule"]


class Settings(DellaSettings):
    """Task vectors of which small elements are dropped more often; those that have the elected sign are averaged."""

    method: Literal["della"] = "della"
    normalise: Annotated[bool, Field(description="Divide by the weights of those that agree.")] = True


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Row by row; the L1 norm, where asked for, is measured first.

    Deep et al. 2024, arXiv:2406.11617.
    """
    from graft.merge._deltas import combine
    from graft.merge._drop import dropped_by_rank

    sparse = dropped_by_rank(tensors, settings.densities, settings.epsilons, settings.rescale)
    return combine(settings, sparse, elect=True)
