"""RAM+ (tensor-local): RAM, with what a model changed alone made stronger where it shares much of its changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.ram import RamSettings, changed, reinforced
from graft.settings import Number

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


class Settings(RamSettings):
    """RAM, a model's own changes multiplied by `1 + r · min(ρ, α)`; ρ is its shared over its own changes, by tensor."""

    method: Literal["ramplus_tl"] = "ramplus_tl"
    r: Annotated[Number, Field(ge=0, description="How much a model's own changes are strengthened.")] = 0.1
    alpha: Annotated[Number, Field(ge=0, description="Bound of the ratio ρ.")] = 0.2


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Shared and own changes are counted first; then element by element.

    arXiv:2601.13572.
    """
    import numpy as np

    def tally(piece: Piece) -> list[tuple[int, int]]:
        thin, count = changed(piece.deltas(), settings.epsilon)
        own, all_ = count == 1, count > 0
        return [(int((d.ne(0) & all_ & ~own).sum()), int((d.ne(0) & own).sum())) for d in thin]

    counts = np.sum(tensors.map(tally), axis=0)
    # a model that changed nothing alone has no ratio: the bound stands for it where it shares anything
    ratios = [shared / own if own else (settings.alpha if shared else 0.0) for shared, own in counts.tolist()]
    alone = [1 + settings.r * min(ratio, settings.alpha) for ratio in ratios]

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        return reinforced(piece.deltas(), settings.epsilon, alone).add_(piece.base)

    return make
