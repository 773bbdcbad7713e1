"""What each member of a mixture contributes, from the members' kept log-probabilities alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from graft.ensemble.gains import interval, mixture
from graft.ensemble.weights import Fit, fit_linear

MOST = 5
"""Members up to which every subset is fitted."""


@dataclass(frozen=True)
class Contribution:
    """Nats a token: `left_out`, how much worse the others are without the member, their weights fitted anew, with its
    95 % interval over documents, `low` to `high` (None where they are not known); `shapley`, the mean gain over all
    orders in which members may join (None for more than MOST members, whose subsets are too many to fit)."""

    left_out: float
    low: float | None
    high: float | None
    shapley: float | None


def contributions(
    log_probs: np.ndarray,
    nothing: float,
    importance: np.ndarray | None = None,
    tolerance: float = 1e-5,
    texts: np.ndarray | None = None,
) -> list[Contribution]:
    """Each member's contribution to the fitted mixture (Shapley 1953): `log_probs [members, tokens]` of what comes.

    `nothing` is the loss of no member at all: the log of the vocabulary's size. The Shapley values sum to what the
    whole mixture gains over that. `texts [tokens]`: the document that each token is from; documents are drawn anew for
    the intervals, with the weights as they are. A single member is missed by all that it gives.
    """
    every = tuple(range(len(log_probs)))
    sizes: Iterable[int] = range(1, len(every) + 1) if len(every) <= MOST else (len(every) - 1, len(every))
    subsets = [subset for size in sizes for subset in itertools.combinations(every, size)]
    fits = {subset: fit_linear(log_probs[list(subset)], importance, tolerance=tolerance) for subset in subsets}
    loss = {(): nothing} | {subset: fit.loss for subset, fit in fits.items()}
    ends = [(None, None) if texts is None else _ends(log_probs, fits, m, texts, importance) for m in every]
    return [
        Contribution(
            loss[_without(every, member)] - loss[every],
            *ends[member],
            _shapley(loss, member, len(every)) if len(every) <= MOST else None,
        )
        for member in every
    ]


def _ends(
    log_probs: np.ndarray,
    fits: dict[tuple[int, ...], Fit],
    member: int,
    texts: np.ndarray,
    importance: np.ndarray | None,
) -> tuple[float | None, float | None]:
    """The interval of what leaving a member out costs; None for the only one, and from one document."""
    every = tuple(range(len(log_probs)))
    rest = _without(every, member)
    if not rest or len(np.unique(texts)) < 2:
        return None, None
    whole, others = (mixture(log_probs[list(subset)], fits[subset].weights) for subset in (every, rest))
    finite = np.isfinite(others) & np.isfinite(whole)
    return interval((whole - others)[finite], texts[finite], 0, None if importance is None else importance[finite])


def _shapley(loss: dict[tuple[int, ...], float], member: int, members: int) -> float:
    others = _without(range(members), member)
    gains = 0.0
    for size in range(members):
        share = math.factorial(size) * math.factorial(members - size - 1) / math.factorial(members)
        for subset in itertools.combinations(others, size):
            gains += share * (loss[subset] - loss[tuple(sorted((*subset, member)))])
    return gains


def _without(members: Iterable[int], member: int) -> tuple[int, ...]:
    return tuple(other for other in members if other != member)
