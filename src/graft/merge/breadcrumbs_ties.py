"""Model Breadcrumbs with the sign election of TIES."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from graft.merge.breadcrumbs import BreadcrumbsSettings

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors


class Settings(BreadcrumbsSettings):
    """Task vectors without outliers and without what is small; those that have the elected sign are added."""

    method: Literal["breadcrumbs_ties"] = "breadcrumbs_ties"


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Both thresholds are measured first, exactly; then element by element.

    Davari and Belilovsky 2024, arXiv:2312.06795; Yadav et al. 2023, arXiv:2306.01708.
    """
    from graft.merge._crumbs import crumbs
    from graft.merge._deltas import combine

    return combine(settings, crumbs(tensors, settings), elect=True)
