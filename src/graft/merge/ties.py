"""TIES: trim small changes, elect a sign for every parameter, average those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import SparseSettings

if TYPE_CHECKING:
    from graft.merge._select import Cut
    from graft.merge.stream import Combine, Tensors


class Settings(SparseSettings):
    """Base plus the disjoint mean of trimmed task vectors: of each, the largest values are kept; for each parameter
    the sign with the larger sum wins, and those that have it are averaged."""

    method: Literal["ties"] = "ties"
    normalise: Annotated[bool, Field(description="Divide by the weights of those that agree.")] = True
    trim: Annotated[
        Literal["tensor", "model"],
        Field(description="Keep the share of every tensor (as mergekit) or of the whole model (as the paper)."),
    ] = "tensor"

    @property
    def of_the_whole_model(self) -> frozenset[str]:
        """A threshold over the whole model keeps one share of it."""
        return frozenset({"density"}) if self.trim == "model" else frozenset()


def survey(tensors: Sequence[Tensors], settings: Settings) -> dict[str, list[Cut]] | None:
    """Where the trim is over the whole model: the cut of every model for every tensor."""
    from graft.merge._deltas import kept, magnitudes
    from graft.merge._select import largest

    if settings.trim == "tensor":
        return None
    whole = sum(tensor.count for tensor in tensors)
    cuts = largest(tensors, magnitudes, [kept(density, whole) for density in settings.densities])
    return {tensor.name: [of_model[place] for of_model in cuts] for place, tensor in enumerate(tensors)}


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Thresholds are measured first, exactly; then element by element.

    Yadav et al. 2023, arXiv:2306.01708.
    """
    from graft.merge._deltas import Thinned, combine, kept, magnitudes
    from graft.merge._fused import Dropping
    from graft.merge._select import largest

    if tensors.survey is None:
        counts = [kept(density, tensors.count) for density in settings.densities]
        cuts = [cut for (cut,) in largest([tensors], magnitudes, counts)]
    else:
        cuts = tensors.survey[tensors.name]
    small = Dropping.small([cut.value for cut in cuts], [cut.last for cut in cuts])
    sparse = Thinned(lambda p: [cut.shrink(d, p.start) for cut, d in zip(cuts, p.deltas(), strict=True)], small)
    return combine(settings, sparse, elect=True)
