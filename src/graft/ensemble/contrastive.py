"""Contrastive decoding: an expert against an amateur among what the expert finds plausible (Li et al. 2023).

Members stand in the order expert, amateur; weights 1 and -1 are the paper's, 1 + β and -β those of O'Brien and Lewis
(2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from graft import settings
from graft.ensemble import log_linear

if TYPE_CHECKING:
    import torch


WIDER = "set `plausibility` of the rule nearer to 0"
"""What leaves more tokens possible."""


class Settings(settings.Settings):
    """Which tokens compete."""

    plausibility: Annotated[
        float, Field(gt=0, le=1, description="Tokens below this share of the expert's best probability are excluded.")
    ] = 0.1


def default(members: int, options: Settings) -> list[float]:
    """Expert 1, amateur -1."""
    return [1.0, -1.0][:members]


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor, options: Settings) -> torch.Tensor:
    """log softmax(Σ λᵢ log_probsᵢ) over the tokens the expert finds plausible: two of `[..., vocabulary] float32`."""
    expert = log_probs[0]
    least = expert.amax(-1, keepdim=True) + math.log(options.plausibility)
    return log_linear.product(log_probs, weights).masked_fill(expert < least, -math.inf).log_softmax(-1)


def problem(weights: Sequence[float]) -> str | None:
    """What is wrong with these weights, or None."""
    if len(weights) != 2 or weights[0] <= 0 or weights[1] > 0:
        return (
            "contrastive decoding takes an expert with a weight above zero and an amateur with a negative one, in this "
            f"order; found weights {list(weights)}"
        )
    return None
