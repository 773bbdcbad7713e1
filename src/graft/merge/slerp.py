"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import MergeSettings
from graft.settings import ModelRef, Number

if TYPE_CHECKING:
    from graft.merge.stream import Combine, Tensors

PARALLEL = 0.9995
"""Above this cosine the great circle is a straight line for all that float32 can tell."""


class Settings(MergeSettings):
    """From the first model (`t: 0`) to the second (`t: 1`) along the great circle, tensor by tensor."""

    method: Literal["slerp"] = "slerp"
    models: Annotated[list[ModelRef], Field(min_length=2, max_length=2, description="The two models.")]
    t: Annotated[Number, Field(ge=0, le=1, description="How far from the first to the second.")] = 0.5


def factors(cosine: float, t: float, parallel: float = PARALLEL) -> tuple[float, float]:
    """`sin((1−t)θ)/sin θ` and `sin(tθ)/sin θ` with `cos θ` given; `1−t` and `t` where the two are (anti)parallel,
    which they are above the cosine `parallel`.

    Shoemake 1985, "Animating rotation with quaternion curves".
    """
    if abs(cosine) > parallel:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """The angle is measured first; then element by element."""
    from graft.merge._gram import add_up, cosines, gram

    return add_up(factors(float(cosines(gram(tensors))[0, 1]), settings.t))
