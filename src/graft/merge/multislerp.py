"""Interpolation on the sphere between any number of models, in one step from their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.errors import CannotCombine
from graft.merge.settings import NormalisedSettings
from graft.settings import ModelRef

if TYPE_CHECKING:
    import numpy as np

    from graft.merge.stream import Combine, Tensors

NEARLY_ZERO = 1e-8


class Settings(NormalisedSettings):
    """The weighted mean in the tangent space at the mean direction, put back on the sphere, tensor by tensor."""

    method: Literal["multislerp"] = "multislerp"
    base: Annotated[ModelRef | None, Field(description="Where given, the task vectors from it are what is turned.")] = (
        None
    )


def factors(gram_mm: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[m] factors: `result = sum_m f_m x_m`. `gram_mm` are the inner products of the x.

    `μ = sum_m w_m u_m / ‖·‖` of the directions u; `τ = sum_m w_m (u_m − (u_m·μ) μ)`; the result is
    `(μ cos ‖τ‖ + τ sin ‖τ‖ / ‖τ‖) sum_m w_m ‖x_m‖`. Goddard 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea.
    Raises ZeroDivisionError where the directions cancel and there are more than two.
    """
    import numpy as np

    from graft.merge._gram import cosines, lengths

    norms, cos_mm = lengths(gram_mm), cosines(gram_mm)
    if not norms.any():
        return weights
    reach = float(np.sqrt(max(weights @ cos_mm @ weights, 0.0)))
    if reach < NEARLY_ZERO:
        if len(weights) == 2:
            return weights
        raise ZeroDivisionError("the weighted directions cancel")
    mean = weights / reach
    dots = cos_mm @ mean
    step = weights - (weights @ dots) * mean
    size = float(np.sqrt(max(step @ cos_mm @ step, 0.0)))
    turned = np.cos(size) * mean + (np.sin(size) / size if size > 0 else 1.0) * step
    return float(weights @ norms) * turned / np.where(norms > 0, norms, 1.0)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Inner products are measured first; then element by element."""
    import numpy as np

    from graft.merge._gram import add_up, gram

    try:
        return add_up(factors(gram(tensors), np.array(settings.factors)).tolist())
    except ZeroDivisionError:
        raise CannotCombine(
            f"{tensors.name}: the weighted directions of {', '.join(settings.names)} cancel and have no mean on the "
            "sphere: give other weights, or use linear"
        ) from None
