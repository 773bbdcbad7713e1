"""Arcee Fusion: of one task vector only the changes that matter most are taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from graft.merge.settings import DeltaSettings
from graft.settings import ModelRef

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors

QUARTILES = (0.25, 0.5, 0.75)


class Settings(DeltaSettings):
    """The base, with the values of one other model where a change is an outlier of importance."""

    method: Literal["arcee_fusion"] = "arcee_fusion"
    models: Annotated[list[ModelRef], Field(min_length=1, max_length=1, description="The other model.")]


def by_rows(settings: Any) -> bool:
    """Importance needs the softmax of a row."""
    return True


def importance(base_rc: Tensor, other_rc: Tensor) -> Tensor:
    """[rows, columns] float32: `|δ| · KL(softmax(other) ‖ softmax(base))`, the divergence that of the row.

    The method is that of the tool mergekit (Arcee 2025); it has no paper.
    """
    import torch

    p = torch.softmax(other_rc, dim=1).add_(1e-8)
    q = torch.softmax(base_rc, dim=1).add_(1e-8)
    divergence = (p * torch.log(p / q)).sum(dim=1, keepdim=True)
    return (other_rc - base_rc).abs_().mul_(divergence)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """The quartiles of the importance are measured first, exactly; then element by element."""
    import torch

    from graft.merge._select import largest

    def scores(piece: Piece) -> Tensor:
        assert piece.base is not None
        shape = (-1, tensors.row)
        return importance(piece.base.view(shape), piece.models[0].view(shape)).view(-1).clamp_(min=0)

    # the value of rank int(q (n − 1)) from below is that of rank n − int(q (n − 1)) from above
    counts = [tensors.count - int(share * (tensors.count - 1)) for share in QUARTILES]
    cuts = largest([tensors], lambda piece: [scores(piece)] * len(QUARTILES), counts)
    low, median, high = (cut.value for (cut,) in cuts)
    threshold = median + 1.5 * (high - low)

    def make(piece: Piece) -> Tensor:
        assert piece.base is not None
        chosen = scores(piece) >= threshold
        return torch.where(chosen, piece.models[0], piece.base)

    return make
