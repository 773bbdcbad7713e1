"""Log-linear interpolation: the renormalised product p(y) ∝ Π pᵢ(y)^λᵢ (Klakow 1998; products of experts, Hinton 2002).

An AND: a member with a positive weight that gives zero vetoes. Negative weights make anti-experts (Liu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """log softmax(Σ λᵢ log_probsᵢ): each `[..., vocabulary] float32`, normalised; `weights [members]` finite.

    What a member of positive weight gives zero stays zero, whatever the others say. An anti-expert's zeros count as its
    smallest float32 probability, so that what it never says is favoured, and finitely so.
    """
    total = torch.zeros_like(log_probs[0])
    for place, lp in enumerate(log_probs):
        weight = weights[place]
        if weight > 0:
            total = total + weight * lp
        elif weight < 0:
            total = total + weight * lp.clamp(min=FLOOR)
    return torch.log_softmax(total, dim=-1)


FLOOR = -87.3
"""log of the smallest normal float32."""


def problem(weights: Sequence[float]) -> str | None:
    """What is wrong with these weights for a product, or None."""
    if not any(w > 0 for w in weights):
        return f"a product needs at least one weight above zero, found {list(weights)}"
    return None
