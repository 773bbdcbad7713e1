"""What each member of a mixture contributes, from the members' kept log-probabilities alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from graft.ensemble.weights import fit_linear

MOST = 5
"""Members up to which every subset is fitted."""


@dataclass(frozen=True)
class Contribution:
    """Nats a token: `left_out`, how much worse the others are without the member, their weights fitted anew; `shapley`,
    its mean gain over all orders in which members may join."""

    left_out: float
    shapley: float


def contributions(
    log_probs: np.ndarray, nothing: float, importance: np.ndarray | None = None, tolerance: float = 1e-5
) -> list[Contribution]:
    """Each member's contribution to the fitted mixture (Shapley 1953): `log_probs [members, tokens]` of what comes.

    `nothing` is the loss of no member at all: the log of the vocabulary's size. The Shapley values sum to what the
    whole mixture gains over that. Raises ValueError for more than MOST members, whose subsets are too many.
    """
    members = len(log_probs)
    if members > MOST:
        raise ValueError(f"expected {MOST} members or fewer, found {members}: their subsets are too many to fit")
    every = range(members)
    loss = {
        subset: fit_linear(log_probs[list(subset)], importance, tolerance=tolerance).loss if subset else nothing
        for size in range(members + 1)
        for subset in itertools.combinations(every, size)
    }
    return [
        Contribution(loss[_without(every, member)] - loss[tuple(every)], _shapley(loss, member, members))
        for member in every
    ]


def _shapley(loss: dict[tuple[int, ...], float], member: int, members: int) -> float:
    others = _without(range(members), member)
    gains = 0.0
    for size in range(members):
        share = math.factorial(size) * math.factorial(members - size - 1) / math.factorial(members)
        for subset in itertools.combinations(others, size):
            gains += share * (loss[subset] - loss[tuple(sorted((*subset, member)))])
    return gains


def _without(members: range, member: int) -> tuple[int, ...]:
    return tuple(other for other in members if other != member)
