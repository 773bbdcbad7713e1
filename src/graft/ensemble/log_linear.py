"""Log-linear interpolation: the renormalised product p(y) ∝ Π pᵢ(y)^λᵢ (Klakow 1998; products of experts, Hinton 2002).

An AND: a member with a positive weight that gives zero vetoes. Negative weights make anti-experts; weights 1, 1 and -1
of a model, a tuned small model and the same small model untuned are proxy tuning (Liu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graft import settings

if TYPE_CHECKING:
    import torch

FLOOR = -87.3
"""log of the smallest normal float32."""


class Settings(settings.Settings):
    """A product has no options."""


def default(members: int, options: Settings) -> list[float]:
    """Equal weights that sum to one: the geometric mean."""
    return [1 / members] * members


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor, options: Settings) -> torch.Tensor:
    """log softmax(Σ λᵢ log_probsᵢ): each `[..., vocabulary] float32`, normalised; `weights [members]` finite.

    What a member of positive weight gives zero stays zero, whatever the others say. An anti-expert's probabilities
    count as at least the smallest normal float32, so that what it never says is favoured, and finitely so.
    """
    if weights.tolist() == [1.0]:
        return log_probs[0]
    return product(log_probs, weights).log_softmax(-1)


def product(log_probs: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ λᵢ log_probsᵢ, before it is normalised; arguments as for `combine`."""
    total = log_probs[0].new_zeros(log_probs[0].shape)
    for log_prob, weight in zip(log_probs, weights.tolist(), strict=True):
        if weight > 0:
            total = total.add(log_prob, alpha=weight)
        elif weight < 0:
            total = total.add(log_prob.clamp(min=FLOOR), alpha=weight)
    return total


def problem(weights: Sequence[float]) -> str | None:
    """What is wrong with these weights for a product, or None."""
    if not any(w > 0 for w in weights):
        return f"a product needs at least one weight above zero, found {list(weights)}"
    return None
