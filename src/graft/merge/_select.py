"""The exact k largest values of a tensor that is never held whole.

A bracket around the k-th largest value is guessed from a sample; one pass over the pieces counts what lies above it and
keeps what lies inside. Counts decide, so the answer is exact whatever the guess was worth: a bracket that missed, or
one that holds too much, is replaced and the pass made again. Equal values are taken in the order in which they lie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.errors import CheckpointError
from graft.merge import _fused
from graft.merge._deltas import magnitudes
from graft.merge.stream import Piece, Tensors

if TYPE_CHECKING:
    from torch import Tensor

Values = Callable[[Piece], "list[Tensor]"]
"""Flat float32 tensors, one for each value stream, none negative, from a piece."""

HELD = 1 << 21
"""Values kept of a stream in one pass, at most."""
FEW = 1 << 18
"""Values that may all be kept: there is nothing to guess."""
SAMPLES, LENGTH, MARGIN = 32, 1 << 12, 0.015
"""The sample are so many runs of so many elements, evenly apart; the bracket reaches the margin to both sides."""
MOST = 128
"""Runs at most: of many pieces as many, and the bracket is narrower by what they know better."""
RUNS = 1 << 12
"""Runs of pieces that a pass counts apart, about; what is held of one does not grow with the model."""


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
        import torch

        split = int(self.last) - start + 1
        return torch.cat([values[:split] >= self.value, values[split:] > self.value])

    def shrink(self, values: Tensor, start: int) -> Tensor:
        """`values`, which are overwritten, with zeros where the magnitude is not among the largest."""
        if self.last >= start + len(values) - 1:
            return _zero_up_to(values, _below(self.value))
        if self.last < start:
            return _zero_up_to(values, self.value)
        split = int(self.last) - start + 1
        _zero_up_to(values[:split], _below(self.value))
        _zero_up_to(values[split:], self.value)
        return values


EVERYTHING, NOTHING = Cut(0.0), Cut(math.inf)


def _zero_up_to(values: Tensor, magnitude: float) -> Tensor:
    import torch

    return torch.ops.aten.hardshrink.out(values, magnitude, out=values)


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
    """One piece, or run of pieces, of one stream, seen through a bracket."""

    above: int
    inside: np.ndarray
    """Values from `low` to `high`, both included; every so-and-so-many of them where there are too many."""
    all_inside: int


@dataclass(frozen=True)
class _Run:
    """Pieces of a tensor that lie side by side."""

    tensor: Tensors
    start: int
    count: int

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first element, number of elements) of one after the other."""
        end = self.start + self.count
        for start in range(self.start, end, self.tensor.piece):
            yield start, min(self.tensor.piece, end - start)


def _runs(tensors: Sequence[Tensors], pieces: int) -> list[_Run]:
    """All of the tensors in runs, of one piece each where there are not too many."""
    together = -(-pieces // RUNS)
    return [
        _Run(tensor, start, min(together * tensor.piece, tensor.count - start))
        for tensor in tensors
        for start in range(0, tensor.count, together * tensor.piece)
    ]


def largest(tensors: Sequence[Tensors], values: Values, counts: Sequence[int]) -> list[list[Cut]]:
    """For every stream and tensor the cut that keeps exactly `counts[stream]` values over all `tensors` together."""
    whole = sum(tensor.count for tensor in tensors)
    pieces = sum(-(-tensor.count // tensor.piece) for tensor in tensors)
    runs = _runs(tensors, pieces)
    open_ = [stream for stream, count in enumerate(counts) if 0 < count < whole]
    found = {stream: [NOTHING if count <= 0 else EVERYTHING] * len(tensors) for stream, count in enumerate(counts)}
    brackets = _guess(tensors, pieces, values, [count / whole for count in counts]) if open_ else {}
    while open_:
        passed = _pass(runs, values, {stream: brackets[stream] for stream in open_})
        for stream in list(open_):
            seen = [each[stream] for each in passed]
            threshold = _threshold(seen, brackets[stream], counts[stream])
            if threshold is None:
                brackets[stream] = _narrower(seen, brackets[stream], counts[stream])
                continue
            place = _last(runs, values, stream, seen, threshold, counts[stream])
            found[stream] = _per_tensor(tensors, runs, threshold, place)
            open_.remove(stream)
    return [found[stream] for stream in range(len(counts))]


def _guess(tensors: Sequence[Tensors], pieces: int, values: Values, shares: Sequence[float]) -> dict[int, _Bracket]:
    """A bracket for every stream, from some elements that lie evenly apart."""
    whole = sum(tensor.count for tensor in tensors)
    if whole <= FEW:
        return {stream: _Bracket(0.0, math.inf) for stream in range(len(shares))}
    count = min(max(pieces, SAMPLES), MOST)

    def some(place: tuple[Tensors, int, int]) -> list[np.ndarray]:
        tensor, start, length = place
        return [each.copy() for each in _arrays(tensor, values, start, length)]

    parts = tensors[0].workers.map(some, list(_places(tensors, whole, count)))
    brackets = {}
    for stream, share in enumerate(shares):
        sample = np.concatenate([part[stream] for part in parts])
        brackets[stream] = _around(sample, share, MARGIN * (SAMPLES / count) ** 0.5)
    return brackets


def _arrays(tensor: Tensors, values: Values, start: int, count: int) -> Sequence[np.ndarray]:
    """The values of a piece in this machine's memory, which may be used again."""
    bits = tensor.bits(start, count) if values is magnitudes else None
    if bits is not None and (found := _fused.magnitudes(bits)) is not None:
        return list(found)
    return [_array(each) for each in values(tensor.read(start, count))]


def _places(tensors: Sequence[Tensors], whole: int, count: int) -> Iterator[tuple[Tensors, int, int]]:
    """(tensor, first element, number) of `count` runs, evenly over all tensors; whole rows where pieces have them."""
    ends = itertools.accumulate(tensor.count for tensor in tensors)
    waiting = iter(zip(tensors, ends, strict=True))
    tensor, end = next(waiting)
    for middle in ((2 * step + 1) * whole // (2 * count) for step in range(count)):
        while middle >= end:
            tensor, end = next(waiting)
        row = tensor.row if tensor.by_rows else 1
        length = min(max(LENGTH // row, 1) * row, tensor.count)
        inside = max(min(middle - (end - tensor.count), tensor.count - length), 0)
        yield tensor, inside // row * row, length


def _around(sample: np.ndarray, share: float, margin: float) -> _Bracket:
    """The values that a share of the sample, more or less the margin, is larger than. Overwrites the sample."""
    size = len(sample)
    low, high = int((share + margin) * size) + 1, int((share - margin) * size) - 1
    inside = [size - 1 - place for place in (low, high) if 0 <= place < size]
    sample.partition(inside)
    return _Bracket(
        float(sample[size - 1 - low]) if low < size else 0.0, float(sample[size - 1 - high]) if high >= 0 else math.inf
    )


def _pass(runs: Sequence[_Run], values: Values, brackets: dict[int, _Bracket]) -> list[dict[int, _Counted]]:
    keep = max(HELD // len(runs), 64)
    workers = runs[0].tensor.workers

    def count(run: _Run) -> dict[int, _Counted]:
        each = max(keep * run.tensor.piece // max(run.count, run.tensor.piece), 1)
        seen: dict[int, list[_Counted]] = {stream: [] for stream in brackets}
        for span in run.spans():
            for stream, found in _counted(run.tensor, values, span, brackets, each).items():
                seen[stream].append(found)
        return {stream: _together(found, brackets[stream]) for stream, found in seen.items()}

    return workers.map(count, runs)


def _counted(
    tensor: Tensors, values: Values, span: tuple[int, int], brackets: dict[int, _Bracket], keep: int
) -> dict[int, _Counted]:
    """What is seen of one piece."""
    bits = tensor.bits(*span) if values is magnitudes else None
    if bits is not None:
        # of a stream that is not asked for any more nothing is inside
        ends = [brackets.get(stream, _Bracket(math.inf, 0.0)) for stream in range(bits.models)]
        low, high = (np.array([getattr(each, end) for each in ends], np.float32) for end in ("low", "high"))
        if (found := _fused.bracketed(bits, low, high)) is not None:
            above, inside = found
            return {stream: _thinned(int(above[stream]), inside[stream], keep) for stream in brackets}
    streams = values(tensor.read(*span))
    return {stream: _seen(streams[stream], bracket, keep, tensor.workers.near) for stream, bracket in brackets.items()}


def _thinned(above: int, inside: np.ndarray, keep: int) -> _Counted:
    """With every so-and-so-manieth of what is inside, `keep` at most."""
    every = 1 if inside.strides == (0,) else max(-(-len(inside) // keep), 1)
    return _Counted(above, inside if inside.strides == (0,) else inside[::every].copy(), len(inside))


def _together(seen: Sequence[_Counted], bracket: _Bracket) -> _Counted:
    """What was seen of a run of pieces."""
    if len(seen) == 1:
        return seen[0]
    above, inside = sum(one.above for one in seen), sum(one.all_inside for one in seen)
    return _Counted(above, _held([one.inside for one in seen], bracket), inside)


def _held(inside: Sequence[np.ndarray], bracket: _Bracket) -> np.ndarray:
    """End to end; of one value so many times nothing is held."""
    if bracket.low == bracket.high:
        return np.broadcast_to(np.float32(bracket.low), sum(map(len, inside)))
    return np.concatenate(inside)


def _seen(values: Tensor, bracket: _Bracket, keep: int, near: bool) -> _Counted:
    import torch

    # numpy is the faster of the two on a processor; the operators are the same
    found: Any = values.numpy() if near else values
    count: Callable[[Any], Any] = np.count_nonzero if near else torch.count_nonzero
    not_above = found <= bracket.high
    above = len(found) - int(count(not_above))
    if bracket.low == bracket.high:
        # one value, so many times: nothing needs to be held
        equal = len(found) - above - int(count(found < bracket.low))
        return _Counted(above, np.broadcast_to(np.float32(bracket.low), equal), equal)
    return _thinned(above, _array(found[not_above & (found >= bracket.low)]), keep)


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    """In this machine's memory."""
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


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
    runs: Sequence[_Run], values: Values, stream: int, seen: Sequence[_Counted], threshold: float, count: int
) -> tuple[int, float]:
    """(run, element) of the last value equal to the threshold that is kept; the run is `len(runs)` if all are."""

    def tally(run: _Run) -> tuple[int, int]:
        larger = equal = 0
        for span in run.spans():
            found = _arrays(run.tensor, values, *span)[stream]
            larger += int(np.count_nonzero(found > threshold))
            equal += int(np.count_nonzero(found == threshold))
        return larger, equal

    if all(len(each.inside) == each.all_inside for each in seen):
        larger = sum(each.above + int(np.count_nonzero(each.inside > threshold)) for each in seen)
        equal = [int(np.count_nonzero(each.inside == threshold)) for each in seen]
    else:
        tallied = runs[0].tensor.workers.map(tally, runs)
        larger, equal = sum(more for more, _ in tallied), [same for _, same in tallied]
    wanted = count - larger
    if wanted >= sum(equal):
        return len(runs), math.inf
    reached = int(np.searchsorted(np.cumsum(equal), wanted))
    wanted -= sum(equal[:reached])
    for start, count in runs[reached].spans():
        places = np.flatnonzero(_arrays(runs[reached].tensor, values, start, count)[stream] == threshold)
        if wanted <= len(places):
            return reached, start + int(places[wanted - 1])
        wanted -= len(places)
    raise CheckpointError(f"{runs[reached].tensor.name}: the files of the models changed while they were read")


def _per_tensor(tensors: Sequence[Tensors], runs: Sequence[_Run], value: float, place: tuple[int, float]) -> list[Cut]:
    run, last = place
    if run == len(runs):
        return [Cut(value)] * len(tensors)
    reached = runs[run].tensor
    cuts, before = [], True
    for tensor in tensors:
        here = tensor is reached
        cuts.append(Cut(value, last if here else math.inf if before else -1))
        before = before and not here
    return cuts
