"""Fisher merging: a mean of the weights in which each counts as much as its model's predictions depend on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from graft.merge._options import OnData
from graft.merge.settings import PositiveSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.prepared import Prepared
    from graft.merge.stream import Combine, Piece, Tensors
    from graft.verb import Job


class Settings(OnData, PositiveSettings):
    """`sum_m w_m F_m θ_m / sum_m w_m F_m`, F the diagonal of the Fisher information: the mean square of the gradient of
    the log-probability of the model's own data, a token."""

    method: Literal["fisher"] = "fisher"
    labels: Annotated[
        Literal["data", "sampled"],
        Field(description="Tokens whose gradients are taken: those of the data, or ones drawn from the model."),
    ] = "data"
    normalise: Annotated[
        bool, Field(description="Divide each model's Fisher information by its mean, so that none counts more.")
    ] = True
    floor: Annotated[
        float, Field(gt=0, description="Least Fisher information of a weight, as a share of the mean over the models.")
    ] = 1e-6

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Settings:
        if self.vocabulary is not None:
            raise ValueError("expected models of one vocabulary: Fisher information has the rows of each model's own")
        return self


def fisher_mean(models: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float], floor: float) -> Tensor:
    """`sum_m w_m max(F_m, floor) θ_m / sum_m w_m max(F_m, floor)` over float32 tensors of one shape; overwrites all.

    Matena and Raffel 2022, arXiv:2111.09832, equation 4.
    """
    import torch

    total, share = torch.zeros_like(models[0]), torch.zeros_like(models[0])
    for model, fisher, weight in zip(models, fishers, weights, strict=True):
        fisher.clamp_(min=floor).mul_(weight)
        total.add_(model.mul_(fisher))
        share.add_(fisher)
    return total.div_(share)


def prepare(job: Job, settings: Settings) -> Prepared:
    """The Fisher information of every model, each in a folder of its own in the scratch."""
    from graft.merge._fisher import measured

    return measured(job, settings)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element: the Fisher information is streamed beside the weights."""
    from graft.merge._fisher import Fishers

    fishers = tensors.survey
    assert isinstance(fishers, Fishers)

    def make(piece: Piece) -> Tensor:
        read = [fishers.read(source, piece.start, len(piece)) for source in tensors.models]
        found = [fisher.to(tensors.workers.device) for fisher in read]
        return fisher_mean(piece.models, found, settings.weights, settings.floor)

    return make
