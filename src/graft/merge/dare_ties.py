"""DARE with the sign election of TIES."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from graft.merge.dare_linear import DareSettings

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors


class Settings(DareSettings):
    """Task vectors of which a share is kept at random, then those that have the elected sign are added."""

    method: Literal["dare_ties"] = "dare_ties"


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element; the L1 norm, where asked for, is measured first.

    Yu et al. 2024, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708.
    """
    from graft.merge._deltas import combine
    from graft.merge._drop import dropped

    return combine(settings, dropped(tensors, settings.densities, settings.rescale), elect=True)
