"""What each member of a mixture or product contributes, from what is kept of the members' predictions alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from graft.ensemble.gains import interval, mixture
from graft.ensemble.kept import Columns
from graft.ensemble.weights import fit_linear, fit_log_linear, product_of

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

    def fitted(subset: tuple[int, ...]) -> Fitted:
        fit = fit_linear(log_probs[list(subset)], importance, tolerance=tolerance)
        return fit.loss, mixture(log_probs[list(subset)], fit.weights)

    return _contributions(len(log_probs), nothing, fitted, importance, texts)


def contributions_to_product(
    columns: Columns, nothing: float, importance: np.ndarray | None = None, texts: np.ndarray | None = None
) -> list[Contribution]:
    """The same of the fitted product. Its weights need not sum to one, so that none of them changes by itself where a
    member is left out: those of the others are fitted anew, as in a mixture. Without any member it is uniform."""

    def fitted(subset: tuple[int, ...]) -> Fitted:
        told = [columns.log_probs[member] for member in subset]
        fit = fit_log_linear(told, columns.place, importance, log_counts=columns.log_counts, tolerance=1e-6)
        return fit.loss, product_of(told, columns.place, fit.weights, columns.log_counts)

    return _contributions(len(columns.log_probs), nothing, fitted, importance, texts)


Fitted = tuple[float, np.ndarray]
"""The loss of some members whose weights are fitted, and what they give the tokens that come, `[tokens]`."""


def _contributions(
    members: int,
    nothing: float,
    fitted: Callable[[tuple[int, ...]], Fitted],
    importance: np.ndarray | None,
    texts: np.ndarray | None,
) -> list[Contribution]:
    every = tuple(range(members))
    sizes: Iterable[int] = range(1, members + 1) if members <= MOST else (members - 1, members)
    subsets = [subset for size in sizes for subset in itertools.combinations(every, size)]
    found = {subset: fitted(subset) for subset in subsets}
    loss = {(): nothing} | {subset: own for subset, (own, _) in found.items()}
    whole = found[every][1]
    rests = {member: _without(every, member) for member in every}
    ends = {
        member: (None, None) if texts is None or not rest else _ends(whole, found[rest][1], texts, importance)
        for member, rest in rests.items()
    }
    return [
        Contribution(
            loss[rest] - loss[every], *ends[member], _shapley(loss, member, members) if members <= MOST else None
        )
        for member, rest in rests.items()
    ]


def _ends(
    whole: np.ndarray, others: np.ndarray, texts: np.ndarray, importance: np.ndarray | None
) -> tuple[float | None, float | None]:
    """The interval of what leaving a member out costs, given the tokens' log-probabilities with all members and without
    it; None from one document."""
    if len(np.unique(texts)) < 2:
        return None, None
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
