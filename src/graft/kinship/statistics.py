"""Whether two sets of weights grew from one initialisation: permutation tests on rows of their matrices.

Networks do not care in which order the dimensions of their hidden state stand. A model of an independent
initialisation was therefore as likely with its hidden state in any other order, whatever it was trained on: shuffling
that order in one of two unrelated models changes nothing about how they look side by side. In two relatives it destroys
what they share.

Shapes: `rows_nd`: n rows of a matrix over the d dimensions of the hidden state, float32, each centred and of length 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

IN_PLACE_DRAWS, MATCHED_DRAWS = 9999, 199
"""Shuffles: the least p-values are 0.0001 and 0.005."""
AT_ONCE = 1 << 18
"""Numbers drawn at once."""
WIDEST, FEW = 2048, 512
"""Dimensions of the hidden state that are looked at, at most: a matrix of so many numbers squared is held, twice. A few
of them are enough for relatives that have hardly changed."""


@dataclass(frozen=True)
class Test:
    """A correlation, its mean where the hidden state is shuffled, and the share of shuffles that reach it."""

    value: float
    null: float
    p: float

    @property
    def excess(self) -> float:
        """How far the value goes from chance (0) to equality (1)."""
        return (self.value - self.null) / max(1 - self.null, 1e-9)


def unit(rows_nd: np.ndarray) -> np.ndarray:
    """Rows centred and of length 1, float32; a row without any spread becomes 0."""
    centred = rows_nd - rows_nd.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


def cross(pairs: Iterable[tuple[np.ndarray, np.ndarray]], widest: int | None = None) -> np.ndarray:
    """[d, d]: how dimension i of one model goes with dimension j of the other, mean over pairs of `rows_nd`.

    Its trace is the mean correlation of corresponding rows. Of more than `widest` dimensions (none: WIDEST) some are
    taken, evenly: an order of these is as good as any other, too, and what is held does not grow with the model.
    """
    total = product = np.zeros((0, 0), np.float32)
    count = 0
    for whole in pairs:
        a, b = (_thin(rows, widest or WIDEST) for rows in whole)
        if not count:
            total, product = (np.zeros((a.shape[1], b.shape[1]), np.float32) for _ in range(2))
        np.matmul(a.T, b, out=product)
        product /= len(a)
        total += product
        count += 1
    return total / np.float32(count)


def _thin(rows_nd: np.ndarray, widest: int) -> np.ndarray:
    every = -(-rows_nd.shape[1] // widest)
    return rows_nd if every == 1 else unit(rows_nd[:, ::every])


def in_place(cross_dd: np.ndarray, seed: int = 0, draws: int = IN_PLACE_DRAWS) -> Test:
    """The correlation of weights that stand at the same places, against shuffles of one model's hidden state.

    One-sided Monte Carlo permutation test, p = (1 + reached) / (1 + draws): exact for every number of draws.
    """
    stay = np.arange(len(cross_dd))[None]
    (value,) = _along(cross_dd, stay)
    shuffled = np.concatenate([_along(cross_dd, orders) for orders in _orders(len(cross_dd), draws, seed)])
    return Test(float(value), float(shuffled.mean()), (1 + int((shuffled >= value).sum())) / (1 + draws))


def _along(cross_dd: np.ndarray, orders_nd: np.ndarray) -> np.ndarray:
    """[n]: the trace when the second model's dimensions stand in each of n orders."""
    return cross_dd[np.arange(len(cross_dd)), orders_nd].sum(axis=1, dtype=np.float64)


def _orders(width: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """`draws` random orders of the dimensions, in pieces [m, width]."""
    random = np.random.default_rng(seed)
    piece = max(AT_ONCE // width, 1)
    for start in range(0, draws, piece):
        stay = np.tile(np.arange(width), (min(piece, draws - start), 1))
        yield random.permuted(stay, axis=1)


def matched(
    some: Sequence[np.ndarray], all_: Sequence[Iterable[np.ndarray]], seed: int = 0, draws: int = MATCHED_DRAWS
) -> Test:
    """The correlation of rows with whichever row of the other model is likest, against shuffles of the hidden state.

    `some`: for each matrix a few rows of one model; `all_`: every row of the other's, in pieces [m, d].
    """
    random = np.random.default_rng(seed)
    width = some[0].shape[1]
    orders = [np.arange(width), *(random.permutation(width) for _ in range(draws))]
    totals = np.zeros(len(orders))
    for rows_nd, pieces in zip(some, all_, strict=True):
        asked = np.concatenate([rows_nd[:, order] for order in orders])
        best = np.full(len(asked), -1.0, dtype=np.float32)
        for piece_md in pieces:
            np.maximum(best, (asked @ piece_md.T).max(axis=1), out=best)
        totals += best.reshape(len(orders), len(rows_nd)).mean(axis=1)
    value, *shuffled = totals / len(some)
    return Test(float(value), float(np.mean(shuffled)), (1 + int(np.sum(shuffled >= value))) / (1 + draws))


def best_order(cross_dd: np.ndarray) -> np.ndarray:
    """`order` so that dimension order[i] of the second model goes best with dimension i of the first (assignment)."""
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(cross_dd, maximize=True)[1])
