"""Combining whole answers: votes on labels or texts, classifiers' probabilities, and the text that risks least.

Pure functions on what members have given; where several answers are equally good, the first of them is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

CLASSES = ("linear", "log_linear", "majority", "ranked")
"""Rules that combine classifiers."""

T = TypeVar("T", bound=Hashable)


def majority(votes: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """The answer with most votes, members counted by `weights` (one each where None).

    Raises ValueError for no votes and for weights that are not one a vote, zero or more.
    """
    counts: dict[T, float] = {}
    for vote, weight in zip(votes, _checked(weights, len(votes)), strict=True):
        counts[vote] = counts.get(vote, 0.0) + weight
    return max(counts, key=lambda answer: counts[answer])


def ranked(rankings: Sequence[Sequence[T]], weights: Sequence[float] | None = None) -> list[T]:
    """All answers, best first, by Borda's count: each ranking gives an answer as many points as it puts behind it.

    `rankings`: each member's answers, best first; answers that it leaves out share what would be left of the places.
    """
    every = list(dict.fromkeys(answer for ranking in rankings for answer in ranking))
    points = dict.fromkeys(every, 0.0)
    for ranking, weight in zip(rankings, _checked(weights, len(rankings)), strict=True):
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"expected each answer once in a ranking, found {list(ranking)}")
        rest = (len(every) - len(ranking) - 1) / 2
        for answer in every:
            place = ranking.index(answer) if answer in ranking else None
            points[answer] += weight * (rest if place is None else len(every) - 1 - place)
    return sorted(every, key=lambda answer: -points[answer])


def least_risk(
    candidates: Sequence[str],
    gain: Callable[[str, str], float],
    weights: Sequence[float] | None = None,
    references: Sequence[str] | None = None,
) -> int:
    """Place of the candidate with the highest expected `gain(candidate, reference)`: minimum Bayes risk (Kumar and
    Byrne 2004).

    `references` stand for what the right text may be, counted by `weights`; the candidates themselves where None.
    """
    told = candidates if references is None else references
    counts = _checked(weights, len(told))
    if not candidates:
        raise ValueError("expected a candidate to choose, found none")
    expected = [sum(w * gain(text, other) for other, w in zip(told, counts, strict=True)) for text in candidates]
    return expected.index(max(expected))


def classify(log_probs: np.ndarray, weights: Sequence[float], rule: str = "linear") -> np.ndarray:
    """Class log-probabilities `[items, classes]` of several classifiers' `[members, items, classes]`.

    `linear`: a mixture; `log_linear`: the renormalised product; `majority`: the share of votes; `ranked`: the share of
    Borda's points. Raises ValueError for another rule or weights that it cannot use.
    """
    import torch

    from graft.methods import method

    if rule not in CLASSES:
        raise ValueError(f"expected {', '.join(CLASSES[:-1])} or {CLASSES[-1]}, found {rule!r}")
    chosen = method("graft.ensemble", rule)
    if wrong := chosen.problem(weights):
        raise ValueError(wrong)
    rows = [torch.as_tensor(each, dtype=torch.float32).log_softmax(-1) for each in log_probs]
    return chosen.combine(rows, torch.tensor(weights, dtype=torch.float32), chosen.Settings()).numpy()


def shares(
    log_probs: Sequence[torch.Tensor], weights: torch.Tensor, points: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The log of what each class has of all points, `[..., classes]` from `[..., classes] float32` each.

    `points` gives those of one classifier, zero or more. NaN of one, which no vote would show, makes all NaN.
    """
    total = sum(
        points(each).masked_fill(each.isnan(), math.nan) * weights[..., place : place + 1]
        for place, each in enumerate(log_probs)
    )
    return (total / total.sum(-1, keepdim=True)).log()  # type: ignore[union-attr]


def flat(outputs: Sequence[Sequence[str]], weights: Sequence[float]) -> tuple[list[str], list[float]]:
    """All members' answers one behind the other, and what each counts: a member's weight, shared out evenly."""
    pairs = [(text, weight / len(each)) for each, weight in zip(outputs, weights, strict=True) for text in each]
    return [text for text, _ in pairs], [count for _, count in pairs]


def _checked(weights: Sequence[float] | None, count: int) -> Sequence[float]:
    found = [1.0] * count if weights is None else list(weights)
    if count == 0 or len(found) != count or min(found) < 0 or not sum(found):
        raise ValueError(f"expected a weight of zero or more for each of {count} members, found {found}")
    return found
