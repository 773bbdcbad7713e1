"""Model Stock: how far to go from the base to the mean follows from the angles between the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge._options import RowSettings, by_rows
from graft.merge.settings import DeltaSettings
from graft.settings import ModelRef

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors

__all__ = ["Settings", "by_rows", "ratio", "rule"]


class Settings(RowSettings, DeltaSettings):
    """`t · mean(θ) + (1 − t) · θ₀` with `t = N cos θ / (1 + (N − 1) cos θ)`, θ the mean angle between task vectors."""

    method: Literal["model_stock"] = "model_stock"
    models: Annotated[list[ModelRef], Field(min_length=2, description="Two or more models; none weighs more.")]


def ratio(cosine: Tensor, models: int) -> Tensor:
    """`t = N cos θ / (1 + (N − 1) cos θ)`; 0 where that has no finite value. Any shape, float64.

    Jang et al. 2024, arXiv:2403.19522, equation 8.
    """
    below = 1 + (models - 1) * cosine
    singular = below.abs() < 1e-6
    return (models * cosine / below.masked_fill(singular, 1.0)).masked_fill(singular, 0.0)


def _ratio(cosine: float, models: int) -> float:
    """The same of one number."""
    below = 1 + (models - 1) * cosine
    return models * cosine / below if abs(below) >= 1e-6 else 0.0


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """By tensor the angles are measured first; by row they lie in the piece."""
    import itertools

    import numpy as np

    from graft.merge._gram import add_up, gram

    count = len(settings.names)
    pairs = list(itertools.combinations(range(count), 2))
    if settings.by == "tensor":
        products = gram(tensors)
        found = [products[i, j] / max((products[i, i] * products[j, j]) ** 0.5, 1e-12) for i, j in pairs]
        mean = float(np.clip(found, -1, 1).mean())
        return add_up([_ratio(mean, count) / count] * count)

    def make(piece: Piece) -> Tensor:
        import torch

        assert piece.base is not None
        rows = [delta.view(-1, tensors.row) for delta in piece.deltas()]
        norms = [row.norm(dim=1).double() for row in rows]
        cosines = [
            ((rows[i] * rows[j]).sum(dim=1).double() / (norms[i] * norms[j]).clamp(min=1e-12)).clamp(-1, 1)
            for i, j in pairs
        ]
        t = ratio(torch.stack(cosines).mean(dim=0), count).float()
        return torch.stack(rows).mean(dim=0).mul_(t[:, None]).view(-1).add_(piece.base)

    return make
