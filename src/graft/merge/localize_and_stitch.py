"""Localize-and-Stitch: of each task vector only a small region, found by size or on a little data, is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from graft.merge._options import WholeModel
from graft.merge.settings import DensitySettings, PerModel, PositiveSettings
from graft.settings import DataRef, ModelRef, Number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from graft.merge._select import Cut
    from graft.merge.prepared import Prepared
    from graft.merge.stream import Combine, Piece, Tensors
    from graft.verb import Facts, Job


class Settings(WholeModel, DensitySettings, PositiveSettings):
    """`θ₀ + λ sum_m w_m γ_m δ_m / sum_m w_m γ_m`, γ of a model 1 in its region and 0 elsewhere. With `on`, the regions
    are learned: `θ₀ + σ(S) δ` is trained on the model's data, from an S that is `bias` for the largest δ and −`bias`
    elsewhere; the region is where S ends above 0. Without, it is the largest δ of the whole model."""

    method: Literal["localize_and_stitch"] = "localize_and_stitch"
    on: Annotated[
        DataRef | dict[ModelRef, DataRef] | None,
        Field(description="Data set that regions are learned on, or one for each model; none: regions by size."),
    ] = None
    density: Annotated[PerModel, Field(description="Share of each task vector in the (first) region.")] = 0.05
    scale: Annotated[Number, Field(description="Factor of the combined task vector, λ in the papers.")] = 1.0
    steps: Annotated[int, Field(ge=0, description="Steps of gradient descent for each region.")] = 50
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate of S.")] = 1e7
    l1: Annotated[float, Field(ge=0, description="Factor of the sum of σ(S) in the objective.")] = 0.0
    bias: Annotated[float, Field(gt=0, description="|S| at the beginning.")] = 5.0
    batch_size: Annotated[int, Field(ge=1, description="Rows of a step.")] = 8

    def passes(self, model: Facts) -> float:
        """Every step reads a batch."""
        return float(self.steps * self.batch_size * len(self.names) * (self.length or 512))


def stitched(deltas: Sequence[Tensor], masks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_m w_m γ_m δ_m / sum_m w_m γ_m`, 0 where no region is; float32 tensors of one shape, all overwritten.

    He et al. 2024, arXiv:2408.13656, section 3.2 (equal weights there).
    """
    import torch

    total, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, mask, weight in zip(deltas, masks, weights, strict=True):
        mask.mul_(weight)
        total.add_(delta.mul_(mask))
        share.add_(mask)
    return total.div_(share.masked_fill_(share == 0, 1.0))


def survey(tensors: Sequence[Tensors], settings: Settings) -> dict[str, list[Cut]]:
    """Of every tensor and model the cut that keeps the largest of the whole model's task vector."""
    from graft.merge._deltas import kept, magnitudes
    from graft.merge._select import largest

    whole = sum(tensor.count for tensor in tensors)
    cuts = largest(tensors, magnitudes, [kept(density, whole) for density in settings.densities])
    return {tensor.name: [of_model[place] for of_model in cuts] for place, tensor in enumerate(tensors)}


def prepare(job: Job, settings: Settings) -> Prepared:
    """The regions, where they are learned; each in a folder of its own in the scratch."""
    from graft.merge.prepared import Prepared

    if settings.on is None:
        return Prepared(settings)
    from graft.merge._localizing import learned

    return learned(job, settings)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Element by element: regions are streamed beside the weights, or follow from the magnitudes."""
    import torch

    found: Any = tensors.survey

    def regions(piece: Piece) -> list[Tensor]:
        if not isinstance(found, dict):
            read = [found.read(source, piece.start, len(piece)) for source in tensors.models]
            return [region.to(tensors.workers.device) for region in read]
        cuts = found[tensors.name]
        sizes = [delta.abs() for delta in piece.models]
        return [c.keep(s, piece.start).float() for c, s in zip(cuts, sizes, strict=True)]

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        deltas = piece.deltas()
        return torch.add(piece.base, stitched(deltas, regions(piece), settings.weights), alpha=settings.scale)

    return make
