"""The Karcher mean: the point of the sphere with the least sum of squared angles to all models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.settings import PositiveSettings

if TYPE_CHECKING:
    import numpy as np

    from graft.merge.stream import Combine, Tensors


class Settings(PositiveSettings):
    """The mean of the models' directions on the sphere, tensor by tensor, with the mean of their lengths."""

    method: Literal["karcher"] = "karcher"
    iterations: Annotated[int, Field(ge=1, description="Steps of the search, at most.")] = 10
    tolerance: Annotated[float, Field(gt=0, description="The search ends when a step is shorter (radians).")] = 1e-5


def factors(gram_mm: np.ndarray, weights: np.ndarray, iterations: int, tolerance: float) -> np.ndarray:
    """[m] factors of the weighted Karcher mean: `mean = sum_m f_m θ_m`. `gram_mm` are the inner products.

    `μ ← exp_μ(sum_m α_m log_μ(θ_m/‖θ_m‖))`, from the normalised mean of directions, times `sum_m α_m ‖θ_m‖`.
    Karcher 1977; for merging arXiv:2603.04972. A model whose tensor is zero has no direction and is left out.
    """
    import numpy as np

    from graft.merge._gram import cosines, lengths

    norms, cos_mm = lengths(gram_mm), cosines(gram_mm)
    alphas = weights / weights.sum()
    share = np.where(norms > tolerance, alphas, 0.0)
    if not share.any():
        return np.zeros_like(norms)
    share /= share.sum()

    def length(c: np.ndarray) -> float:
        return float(np.sqrt(max(c @ cos_mm @ c, 0.0)))

    mean = share if length(share) >= tolerance else np.eye(len(norms))[int(np.argmax(share > 0))]
    mean = mean / length(mean)
    for _ in range(iterations):
        dots = np.clip(cos_mm @ mean, -1, 1)
        angles = np.arccos(dots)
        # θ/sin θ → 1 as θ → 0
        pull = share * np.where(angles < tolerance, 1.0, angles / np.maximum(np.sin(angles), 1e-300))
        step = pull - (pull @ dots) * mean
        size = length(step)
        if size < tolerance:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / length(mean)
    return float(alphas @ norms) * mean / np.where(norms > 0, norms, 1.0)


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """Inner products are measured first; then element by element."""
    import numpy as np

    from graft.merge._gram import add_up, gram

    weights = np.array(settings.weights)
    return add_up(factors(gram(tensors), weights, settings.iterations, settings.tolerance).tolist())
