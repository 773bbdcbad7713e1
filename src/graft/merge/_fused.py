"""Rules that have a kernel beside the plain way: what a kernel is called with. Light.

A kernel gives the bytes of the plain way, several times as fast; where there is none for the stored types, or it met
NaN or Inf, the piece is made the plain way, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from graft.merge._blocks import BLOCK, BUCKETS, CUT, DRAWN, DROPPED, LANES, RANKED, SUMMED
from graft.merge._compiled import kernel

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Bits, ByKernel, Combine, Piece

NO_LAST = 1 << 62


@dataclass(frozen=True)
class Fused:
    """A rule, and the kernel that does the same."""

    plain: Combine
    by_kernel: ByKernel

    def __call__(self, piece: Piece) -> Tensor:
        """The plain way."""
        return self.plain(piece)


@dataclass(frozen=True)
class Dropping:
    """What a kernel does to the deltas of all models before they come together; arrays have a row a model."""

    how: int = SUMMED
    cuts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """[m] float32: magnitudes up to it become zero; up to element `lasts`, only those below it do."""
    lasts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint32))
    """[m, 2] uint32: which numbers are drawn."""
    limits: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.uint32))
    """[m, 1], or by rank [m, row], uint32: a draw below it keeps the element."""
    gains: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    """As `limits`, float32: factor of what is kept; 0 for a model of which everything is."""

    @classmethod
    def small(cls, cuts: Sequence[float], lasts: Sequence[float]) -> Dropping:
        """Cut what is not among the largest (see `_select.Cut`)."""
        upto = [NO_LAST if last == float("inf") else int(last) for last in lasts]
        return cls(CUT, np.array(cuts, np.float32), np.array(upto, np.int64))

    @classmethod
    def at_random(
        cls, keys: Sequence[np.ndarray], limits: Sequence[np.ndarray], gains: Sequence[np.ndarray]
    ) -> Dropping:
        """Drop by a draw; with more than one limit a model, by the limit of its rank in a row of so many."""
        how = DROPPED if len(limits[0]) == 1 else RANKED
        both = np.stack(limits).astype(np.uint32), np.stack(gains).astype(np.float32)
        return cls(how, keys=np.stack(keys).astype(np.uint32), limits=both[0], gains=both[1])


def weighted_sum(weights: Sequence[float]) -> ByKernel:
    """`sum_m w_m θ_m`."""
    factors = np.array(weights, np.float32)

    def make(bits: Bits, made: str, out: np.ndarray) -> bool:
        call = kernel("weighted_sum", bits.stored, made)
        scratch = bits.scratch("values", np.float32, 2 * BLOCK)
        return call is not None and not call(*_piece(bits), _at(factors), _at(scratch), _at(out))

    return make


def deltas(
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    divisor: float = 1.0,
    elect: bool = False,
    normalise: bool = False,
    dropping: Dropping | None = None,
) -> ByKernel:
    """`θ₀ + λ sum_m w_m δ_m / divisor` of what is left of the deltas; with `elect`, of those that have the elected
    sign, `normalise`d by the weights of these."""
    factors, drop = np.array(weights, np.float32), dropping or Dropping()
    row = drop.limits.shape[1]

    def make(bits: Bits, made: str, out: np.ndarray) -> bool:
        call = kernel("deltas", bits.stored, made)
        if call is None:
            return False
        block = BLOCK if drop.how != RANKED else max(BLOCK // row, 1) * row
        lasts = drop.lasts - bits.start
        scratch = bits.scratch("values", np.float32, (bits.models + 5) * block)
        places = bits.scratch("places", np.uint32, (3 + BUCKETS) * block + 257 + 2 * DRAWN)
        order = bits.scratch("order", np.uint64, 2 * block)
        work = (*_piece(bits), bits.start, drop.how, block, row)
        how = (_at(drop.cuts), _at(lasts), _at(drop.keys), _at(drop.limits), _at(drop.gains))
        together = (_at(factors), int(elect), int(normalise), divisor, scale)
        return not call(*work, *how, *together, _at(scratch), _at(places), _at(order), _at(out))

    return make


def inner_products(bits: Bits) -> np.ndarray | None:
    """[m (m + 1) / 2, LANES] float64: sums of the products of models i ≥ j, or of their deltas, to be added up."""
    call, pairs = kernel("inner_products", bits.stored, bits.stored), bits.models * (bits.models + 1) // 2
    found = np.zeros((pairs, LANES))
    scratch = bits.scratch("values", np.float32, (bits.models + 1) * BLOCK)
    if call is None or call(*_piece(bits), int(bits.base), _at(scratch), _at(found)):
        return None
    return found


def magnitudes(bits: Bits) -> np.ndarray | None:
    """[m, count] float32: |δ| of every model."""
    call = kernel("magnitudes", bits.stored, bits.stored)
    found = bits.scratch("found", np.float32, bits.models * bits.count)
    scratch = bits.scratch("values", np.float32, BLOCK)
    if call is None or call(*_piece(bits), _at(scratch), _at(found)):
        return None
    return found.reshape(bits.models, bits.count)


def bracketed(bits: Bits, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """How many |δ| of each model lie above `high`, and those from `low` to `high`, in their order.

    low, high: [m] float32. Of a bracket of one value an array of as many of it; of one that is empty (low above high)
    an empty one.
    """
    call = kernel("bracketed", bits.stored, bits.stored)
    room = bits.count + LANES
    found = bits.scratch("found", np.float32, bits.models * room).reshape(bits.models, room)
    scratch = bits.scratch("values", np.float32, 2 * BLOCK)
    above, inside = np.zeros(bits.models, np.int64), np.zeros(bits.models, np.int64)
    ends = (_at(low), _at(high), _at(scratch), _at(above), _at(inside), _at(found))
    if call is None or call(*_piece(bits), *ends):
        return None
    values = [
        np.broadcast_to(one, number) if one == other else row[:number]
        for one, other, row, number in zip(low, high, found, inside.tolist(), strict=True)
    ]
    return above, values


def draws(start: int, count: int, key: np.ndarray) -> np.ndarray | None:
    """[count] uint32: the numbers of the elements from `start`."""
    call = kernel("draws", "BF16", "BF16")
    if call is None:
        return None
    room = np.empty(count + 2 * DRAWN, np.uint32)
    first = call(start, count, int(key[0]), int(key[1]), _at(room))
    return room[first : first + count]


def _piece(bits: Bits) -> tuple[int, int, int, int]:
    return _at(bits.values), bits.count, bits.models, bits.count


def _at(array: np.ndarray) -> int:
    return array.ctypes.data
