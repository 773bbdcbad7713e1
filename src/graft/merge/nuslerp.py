"""Spherical interpolation between two models or two task vectors, of tensors or of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from graft.merge._options import RowSettings, by_rows
from graft.settings import ModelRef

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Combine, Piece, Tensors


__all__ = ["Settings", "by_rows", "rule", "slerp_rows"]
PARALLEL = 1 - 1e-12
"""Above this cosine two vectors are parallel; nearer to it than `slerp`, as mergekit's nuslerp has it."""


class Settings(RowSettings):
    """Slerp with `t = w₂ / (w₁ + w₂)`, between models, or between task vectors where there is a base."""

    method: Literal["nuslerp"] = "nuslerp"
    base: Annotated[ModelRef | None, Field(description="Where given, the task vectors from it are interpolated.")] = (
        None
    )

    @model_validator(mode="after")
    def _two(self) -> Settings:
        if len(self.names) != 2:
            raise ValueError(f"expected two models, found {len(self.names)}")
        if abs(sum(self.weights)) < 1e-6:
            raise ValueError("expected weights whose sum is not 0")
        return self


def slerp_rows(a_rc: Tensor, b_rc: Tensor, t: float) -> Tensor:
    """[rows, columns] float32: each row of `a_rc` turned by the share `t` of its angle to that of `b_rc`.

    Straight where the two rows are parallel, antiparallel, or one is zero. Shoemake 1985.
    """
    import torch

    a, b = a_rc.double(), b_rc.double()
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = ((a * b).sum(dim=1) / norms.clamp(min=1e-30)).clamp(-1, 1)
    straight = (cosine.abs() > PARALLEL) | (norms == 0)
    angle = torch.acos(cosine.masked_fill(straight, 0.0))
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    second = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return a_rc * first.float()[:, None] + b_rc * second.float()[:, None]


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """By tensor the angle is measured first; by row it lies in the piece."""
    from graft.merge._gram import add_up, cosines, gram, vectors
    from graft.merge.slerp import factors

    first, second = settings.weights
    t = second / (first + second)
    if settings.by == "tensor":
        return add_up(factors(float(cosines(gram(tensors))[0, 1]), t, PARALLEL))

    def make(piece: Piece) -> Tensor:
        a, b = (values.view(-1, tensors.row) for values in vectors(piece))
        turned = slerp_rows(a, b, t).view(-1)
        return turned if piece.base is None else turned.add_(piece.base)

    return make
