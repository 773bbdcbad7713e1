"""Experts and anti-experts: p(y) ∝ base(y) · (expert(y) / anti-expert(y))^α (DExperts, Liu et al. 2021).

Members stand in the order base, expert, anti-expert. The base decides which tokens are possible at all (its nucleus),
the others how likely they are. With in- and out-of-domain language models in the two last places this is
domain-differential adaptation (Dou et al. 2019).
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


WIDER = "set `top_p` of the rule nearer to 1"
"""What leaves more tokens possible."""


class Settings(settings.Settings):
    """How far the base is moved, and among which tokens."""

    alpha: Annotated[float, Field(description="Strength; 0 leaves the base as it is.")] = 1.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description="Only tokens in the base's nucleus of this mass stay possible.")
    ] = 1.0


def default(members: int, options: Settings) -> list[float]:
    """Base 1, expert α, anti-expert -α."""
    return [1.0, options.alpha, -options.alpha][:members]


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor, options: Settings) -> torch.Tensor:
    """The product, renormalised over the base's nucleus: `log_probs` three of `[..., vocabulary] float32`."""
    total = log_linear.product(log_probs, weights)
    if options.top_p < 1:
        total = total.masked_fill(~nucleus(log_probs[0], options.top_p), -math.inf)
    return total.log_softmax(-1)


def nucleus(log_probs: torch.Tensor, mass: float) -> torch.Tensor:
    """Mask of the most likely tokens that together reach `mass`, always at least one (Holtzman et al. 2020)."""
    ordered, places = log_probs.exp().sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return (before < mass).gather(-1, places.argsort(-1))


def problem(weights: Sequence[float]) -> str | None:
    """What is wrong with these weights, or None."""
    if len(weights) != 3 or weights[0] != 1 or weights[1] != -weights[2]:
        return (
            f"experts take three members in the order base, expert, anti-expert, with weights 1, α, -α; found "
            f"{len(weights)} with weights {list(weights)}: list them without weights and set alpha, or use log_linear"
        )
    return None
