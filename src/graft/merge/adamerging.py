"""AdaMerging: how much of each task vector is added, learned on text without labels by making predictions sure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge._options import WholeModel
from graft.merge.settings import DeltaSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.prepared import Prepared
    from graft.merge.stream import Combine, Piece, Tensors
    from graft.verb import Facts, Job


class Settings(WholeModel, DeltaSettings):
    """`θ₀ + sum_m λ_m w_m δ_m` with λ for each model, or for each model and layer, that make the entropy of the merged
    model's predictions of the next token small."""

    method: Literal["adamerging"] = "adamerging"
    by: Annotated[
        Literal["model", "layer", "tensor"], Field(description="What has a λ of its own, for each model.")
    ] = "layer"
    start: Annotated[float, Field(description="The λ that it begins with.")] = 0.3
    steps: Annotated[int, Field(ge=0, description="Steps of Adam.")] = 100
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate of Adam.")] = 1e-3
    batch_size: Annotated[int, Field(ge=1, description="Rows of each data set in a step.")] = 8
    clamp: Annotated[bool, Field(description="Keep λ between 0 and 1.")] = True

    def passes(self, model: Facts) -> float:
        """Every step reads a batch of each data set."""
        sets = len({self.data_of(name) for name in self.names})
        return float(self.steps * self.batch_size * sets * (self.length or 512))


def added(base: Tensor, models: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """`θ₀ + sum_m λ_m (θ_m − θ₀)` over float32 tensors of one shape; the models are overwritten.

    Yang et al. 2024, arXiv:2310.02575, equations 4 and 5.
    """
    from graft.merge.task_arithmetic import add_deltas

    return add_deltas(base, models, factors)


def entropy(logits: Tensor) -> Tensor:
    """`−sum_v p_v log p_v` in nats over the last dimension; [..., vocabulary] → [...], float32. Equation 6 there."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def prepare(job: Job, settings: Settings) -> Prepared:
    """Learn λ; what has been learned stands in the scratch after every step."""
    from graft.merge._adamerging import learned

    return learned(job, settings)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element, each tensor with the λ that were learned for it."""
    lambdas = tensors.survey[tensors.name]
    factors = [found * weight for found, weight in zip(lambdas, settings.weights, strict=True)]

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        return added(piece.base, piece.models, factors)

    return make
