"""The exact k largest values of a tensor that is never held whole.

A bracket around the k-th largest value is guessed from a sample; one pass over the pieces counts what lies above it and
keeps what lies inside. Counts decide, so the answer is exact whatever the guess was worth: a bracket that missed, or
one that holds too much, is replaced and the pass made again. Equal values are taken in the order in which they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.merge.stream import Piece, Tensors

Values = Callable[[Piece], list[Tensor]]
"""Flat float32 tensors, one for each value stream, none negative, from a piece."""

HELD = 1 << 21
"""Values kept of a stream in one pass, at most."""
SAMPLES, EVERY, MARGIN = 12, 11, 0.015
"""Every so-and-so-many elements of so many pieces are the sample; the bracket reaches the margin to both sides."""


@dataclass(frozen=True)
class Cut:
    """What belongs to the largest: values above `value`, and values equal to it up to the element `last`."""

    value: float
    last: float = math.inf

    def keep(self, values: Tensor, start: int) -> Tensor:
        """Bool: which of these values, the first of them element `start`, belong to the largest."""
        if self.last >= start + len(values) - 1:
            return values >= self.value
        if self.last < start:
            return values > self.value
        split = int(self.last) - start + 1
        return torch.cat([values[:split] >= self.value, values[split:] > self.value])

    def shrink(self, values: Tensor, start: int) -> Tensor:
        """`values` with zeros where the magnitude is not among the largest."""
        if self.last >= start + len(values) - 1:
            return torch.nn.functional.hardshrink(values, _below(self.value))
        if self.last < start:
            return torch.nn.functional.hardshrink(values, self.value)
        split = int(self.last) - start + 1
        return torch.cat([Cut(self.value).shrink(values[:split], 0), Cut(self.value, -1).shrink(values[split:], 0)])


EVERYTHING, NOTHING = Cut(0.0), Cut(math.inf)


def _below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


@dataclass(frozen=True)
class _Bracket:
    """Where the value of the wanted rank is guessed to lie, and the bounds that earlier passes have proved."""

    low: float
    high: float
    least: float = 0.0
    most: float = math.inf


@dataclass(frozen=True)
class _Counted:
    """One piece of one stream, seen through a bracket."""

    above: int
    inside: np.ndarray
    """Values from `low` to `high`, both included; every so-and-so-many of them where there are too many."""
    all_inside: int


def largest(tensors: Sequence[Tensors], values: Values, counts: Sequence[int]) -> list[list[Cut]]:
    """For every stream and tensor the cut that keeps exactly `counts[stream]` values over all `tensors` together."""
    items = [(tensor, span) for tensor in tensors for span in tensor.spans()]
    whole = sum(tensor.count for tensor in tensors)
    open_ = [stream for stream, count in enumerate(counts) if 0 < count < whole]
    found = {stream: [NOTHING if count <= 0 else EVERYTHING] * len(tensors) for stream, count in enumerate(counts)}
    brackets = _guess(tensors, values, counts, whole) if open_ else {}
    while open_:
        passed = _pass(items, values, {stream: brackets[stream] for stream in open_})
        for stream in list(open_):
            pieces = [seen[stream] for seen in passed]
            threshold = _threshold(pieces, brackets[stream], counts[stream])
            if threshold is None:
                brackets[stream] = _narrower(pieces, brackets[stream], counts[stream])
                continue
            place = _last(items, values, stream, pieces, threshold, counts[stream])
            found[stream] = _per_tensor(tensors, items, threshold, place)
            open_.remove(stream)
    return [found[stream] for stream in range(len(counts))]


def _guess(tensors: Sequence[Tensors], values: Values, counts: Sequence[int], whole: int) -> dict[int, _Bracket]:
    """A bracket for every stream, from some elements of pieces that lie evenly apart."""
    items = [(tensor, span) for tensor in tensors for span in tensor.spans()]
    if len(items) <= 2 * SAMPLES:
        return {stream: _Bracket(0.0, math.inf) for stream in range(len(counts))}

    def some(item: tuple[Tensors, tuple[int, int]]) -> list[np.ndarray]:
        return [_array(found[::EVERY]).copy() for found in values(item[0].read(*item[1]))]

    parts = tensors[0].workers.map(some, items[SAMPLES // 2 :: len(items) // SAMPLES])
    brackets = {}
    for stream, count in enumerate(counts):
        sample = np.sort(np.concatenate([part[stream] for part in parts]))[::-1]
        brackets[stream] = _around(sample, count / whole, MARGIN)
    return brackets


def _around(descending: np.ndarray, share: float, margin: float) -> _Bracket:
    """The values that a share of the sample, more or less the margin, is larger than."""
    size = len(descending)
    low, high = int((share + margin) * size) + 1, int((share - margin) * size) - 1
    return _Bracket(float(descending[low]) if low < size else 0.0, float(descending[high]) if high >= 0 else math.inf)


def _pass(items: Sequence, values: Values, brackets: dict[int, _Bracket]) -> list[dict[int, _Counted]]:
    keep = max(HELD // len(items), 64)
    workers = items[0][0].workers

    def count(item: tuple[Tensors, tuple[int, int]]) -> dict[int, _Counted]:
        tensor, span = item
        streams = values(tensor.read(*span))
        return {stream: _seen(streams[stream], bracket, keep, workers.near) for stream, bracket in brackets.items()}

    return workers.map(count, items)


def _seen(values: Tensor, bracket: _Bracket, keep: int, near: bool) -> _Counted:
    # numpy is the faster of the two on a processor; the operators are the same
    found: Any = values.numpy() if near else values
    count: Callable[[Any], Any] = np.count_nonzero if near else torch.count_nonzero
    not_above = found <= bracket.high
    above = len(found) - int(count(not_above))
    if bracket.low == bracket.high:
        # one value, so many times: nothing needs to be held
        equal = len(found) - above - int(count(found < bracket.low))
        return _Counted(above, np.broadcast_to(np.float32(bracket.low), equal), equal)
    inside = found[not_above & (found >= bracket.low)]
    every = max(-(-len(inside) // keep), 1)
    return _Counted(above, np.ascontiguousarray(_array(inside[::every])), len(inside))


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    """In this machine's memory."""
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def _threshold(pieces: Sequence[_Counted], bracket: _Bracket, count: int) -> float | None:
    """The value of rank `count`, where this pass has decided it."""
    above = sum(piece.above for piece in pieces)
    inside = sum(piece.all_inside for piece in pieces)
    if not above < count <= above + inside:
        return None
    if bracket.low == bracket.high:
        return bracket.low
    if any(len(piece.inside) < piece.all_inside for piece in pieces):
        return None
    held = np.concatenate([piece.inside for piece in pieces])
    rank = len(held) - (count - above)
    held.partition(rank)
    return float(held[rank])


def _narrower(pieces: Sequence[_Counted], bracket: _Bracket, count: int) -> _Bracket:
    """The next bracket: the other side of one that missed, or a part of one that held too much."""
    above = sum(piece.above for piece in pieces)
    inside = sum(piece.all_inside for piece in pieces)
    if count <= above:
        return _Bracket(bracket.high, bracket.most, bracket.high, bracket.most)
    if count > above + inside:
        return _Bracket(bracket.least, bracket.low, bracket.least, bracket.low)
    kept = np.concatenate([piece.inside for piece in pieces])
    weights = np.concatenate(
        [np.full(len(piece.inside), piece.all_inside / max(len(piece.inside), 1)) for piece in pieces]
    )
    order = np.argsort(-kept, kind="stable")
    reached = np.cumsum(weights[order])
    middle = int(np.searchsorted(reached, count - above))
    reach = max(len(kept) // 32, 1)
    low, high = kept[order[min(middle + reach, len(kept) - 1)]], kept[order[max(middle - reach, 0)]]
    if (float(low), float(high)) == (bracket.low, bracket.high):
        # nothing but a few different values: the one in the middle is tried alone
        value = float(kept[order[min(middle, len(kept) - 1)]])
        return _Bracket(value, value, bracket.low, bracket.high)
    return _Bracket(float(low), float(high), bracket.low, bracket.high)


def _last(
    items: Sequence, values: Values, stream: int, pieces: Sequence[_Counted], threshold: float, count: int
) -> tuple[int, float]:
    """(item, element) of the last value equal to the threshold that is kept; the item is `len(items)` if all are."""

    def tally(item: tuple[Tensors, tuple[int, int]]) -> tuple[int, int]:
        found = values(item[0].read(*item[1]))[stream]
        return int(torch.count_nonzero(found > threshold)), int(torch.count_nonzero(found == threshold))

    if all(len(piece.inside) == piece.all_inside for piece in pieces):
        larger = sum(piece.above + int(np.count_nonzero(piece.inside > threshold)) for piece in pieces)
        equal = [int(np.count_nonzero(piece.inside == threshold)) for piece in pieces]
    else:
        tallied = items[0][0].workers.map(tally, items)
        larger, equal = sum(more for more, _ in tallied), [same for _, same in tallied]
    wanted = count - larger
    if wanted >= sum(equal):
        return len(items), math.inf
    item = int(np.searchsorted(np.cumsum(equal), wanted))
    tensor, span = items[item]
    places = np.flatnonzero(_array(values(tensor.read(*span))[stream]) == threshold)
    return item, span[0] + int(places[wanted - sum(equal[:item]) - 1])


def _per_tensor(tensors: Sequence[Tensors], items: Sequence, value: float, place: tuple[int, float]) -> list[Cut]:
    item, last = place
    if item == len(items):
        return [Cut(value)] * len(tensors)
    reached = items[item][0]
    cuts, before = [], True
    for tensor in tensors:
        here = tensor is reached
        cuts.append(Cut(value, last if here else math.inf if before else -1))
        before = before and not here
    return cuts
