"""A uniform soup: the plain mean of all models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import MergeSettings
from graft.settings import ModelRef

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors


class Settings(MergeSettings):
    """`1/N sum_m θ_m`: every model counts the same."""

    method: Literal["uniform_soup"] = "uniform_soup"
    models: Annotated[list[ModelRef], Field(min_length=1, description="Models; none weighs more.")]


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, nothing measured before.

    Wortsman et al. 2022, arXiv:2203.05482.
    """
    from graft.merge.linear import weighted_sum

    shares = [1 / len(tensors.models)] * len(tensors.models)
    return lambda piece: weighted_sum(piece.models, shares)
