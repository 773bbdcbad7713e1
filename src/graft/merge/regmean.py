"""RegMean: linear layers whose outputs are as near as can be to those of every model on its own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.errors import CheckpointError
from graft.merge._options import OnData
from graft.merge.settings import PositiveSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge.prepared import Prepared
    from graft.merge.stream import Combine, Tensors
    from graft.verb import Facts, Job


class RegressionSettings(OnData, PositiveSettings):
    """Linear layers by least squares on their inputs; other tensors by their weighted mean."""

    alpha: Annotated[
        float, Field(ge=0, le=1, description="Factor of the off-diagonal of the Gram matrices; 0 ignores it.")
    ] = 0.9

    experts: Annotated[
        bool, Field(description="Experts that lie in one parameter, too, each by its own inputs; false: their mean.")
    ] = True

    def passes(self, model: Facts) -> float:
        """Forward only."""
        return self.tokens * len(self.names) / 3


class Settings(RegressionSettings):
    """`W = (sum_m w_m W_m G_m) (sum_m w_m G_m)⁻¹` for linear layers, G the mean outer product of the layer's inputs on
    the model's data, its off-diagonal times α. Other tensors: the weighted mean."""

    method: Literal["regmean"] = "regmean"


PULLS = (1e-4, 1e-2)
"""By the first of these that is enough for the inverse, the diagonal of the sum counts more: a pull towards the mean,
which decides where inputs are few or depend on each other."""


def regression_mean(
    models: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], alpha: float
) -> Tensor:
    """The W [out, in] with the least `sum_m w_m tr((W − W_m) G_m (W − W_m)ᵀ)`; `models` [out, in], `grams` [in, in].

    float32 in and out, float64 between. Inputs that are always zero keep the weighted mean. Jin et al. 2023,
    arXiv:2212.09849, equation 2 and section 4.1 (α).
    """
    import torch

    share = [weight / sum(weights) for weight in weights]
    mean = torch.stack([s * model.double() for s, model in zip(share, models, strict=True)]).sum(dim=0)
    left, right = torch.zeros_like(grams[0], dtype=torch.float64), torch.zeros_like(mean)
    for s, model, gram in zip(share, models, grams, strict=True):
        scaled = gram.double() * alpha
        scaled.diagonal().copy_(gram.diagonal())
        left.add_(scaled, alpha=s)
        # solved for the way from the mean, so that there is none where the inputs say nothing
        right.addmm_(model.double() - mean, scaled, alpha=s)
    left.diagonal().masked_fill_(left.diagonal() <= 0, 1.0)
    for pull in PULLS:
        left.diagonal().mul_(1 + pull)
        factor, failed = torch.linalg.cholesky_ex(left)
        if not failed:
            return (mean + torch.cholesky_solve(right.T, factor).T).float()
    raise CheckpointError("expected Gram matrices without NaN or Inf, found some: a model gives such activations")


def regressed(models: Sequence[Tensor], grams: Sequence[Tensor], turned: bool, settings: RegressionSettings) -> Tensor:
    """`regression_mean` of weights [out, in], [in, out] where `turned`; of [experts, …] with grams [experts, in, in]
    for each expert. An expert that no model sends a token to keeps the weighted mean."""
    import torch

    if grams[0].dim() == 3:
        each = [[of[expert] for of in (*models, *grams)] for expert in range(len(grams[0]))]
        return torch.stack([regressed(e[: len(models)], e[len(models) :], turned, settings) for e in each])
    matrices = [model.T if turned else model for model in models]
    merged = regression_mean(matrices, grams, settings.weights, settings.alpha)
    return merged.T if turned else merged


def prepare(job: Job, settings: Settings) -> Prepared:
    """The Gram matrices of the inputs of every linear layer of every model, in files in the scratch."""
    from graft.merge._grams import measured

    return measured(job, settings)


def rule(tensors: Tensors, settings: RegressionSettings) -> Combine:
    """Linear layers one at a time, whole; the rest element by element."""
    from graft.merge._grams import Grams
    from graft.merge._whole import made, whole
    from graft.merge.linear import weighted_sum

    grams = tensors.survey
    assert isinstance(grams, Grams)
    found = [grams.of(source) for source in tensors.models]
    if any(gram is None for gram in found):
        total = sum(settings.weights)
        return lambda piece: weighted_sum(piece.models, [weight / total for weight in settings.weights])
    with tensors.workers.alone():
        _, models = whole(tensors)
        read = [gram.read().to(tensors.workers.device) for gram in found if gram is not None]
        turned = any(gram.transposed for gram in found if gram is not None)
        return made(regressed(models, read, turned, settings))
