"""Packing: token streams cut into rows of one length without waste; segments say which tokens may see each other.

A packed row holds `input_ids [length] int64`, `segments [length] int64` (0, 1, … for the documents in the row, -1 for
padding), `positions [length] int64` (from 0 in each segment) and `trained [length] bool` (tokens to be produced).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from graft.data.rows import Order, Row, Rows, stack
from graft.data.stream import TokenStream
from graft.data.turns import Evenly


def pack(streams: Sequence[tuple[TokenStream, float]], length: int, seed: int, *, whole: bool, pad: int = 0) -> Rows:
    """Rows of `length` tokens from one stream or a mixture (share of the tokens beside each stream).

    `whole` keeps each document in one row (instructions; one longer than a row loses its end); otherwise documents run
    on from row to row and every row but an epoch's last is full.
    """
    kind = WholeDocuments if whole else RunningText
    parts: list[Rows] = [kind(stream, length, seed + place, pad) for place, (stream, _) in enumerate(streams)]
    return parts[0] if len(parts) == 1 else MixedRows(parts, [share for _, share in streams], seed)


class RunningText:
    """All documents one behind the other, in a new order each epoch, cut every `length` tokens: no token is wasted.

    Rows are shuffled as well, so that a long document does not fill consecutive batches. A piece of a document that
    begins a row has no context, so its first token is not trained on.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int, pad: int = 0):
        self.stream, self.length, self.seed, self.pad = stream, length, seed, pad
        self.lengths = np.diff(np.asarray(stream.offsets))
        self.rows = Order(-(-int(self.lengths.sum()) // length), seed)
        self._epoch = -1
        self._documents = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.rows.count

    def __getitem__(self, index: int) -> Row:
        epoch, row = self.rows(index)
        self._arrange(epoch)
        start = row * self.length
        end = min(start + self.length, int(self._ends[-1]))
        pieces = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < end:
            document, stop = int(self._documents[place]), int(self._ends[place])
            first = int(self.stream.offsets[document])
            begin = first + start - (stop - int(self.lengths[document]))
            size = min(stop, end) - start
            if size:
                pieces.append((begin, begin + size, first))
            start, place = start + size, place + 1
        return _row(self.stream, pieces, self.length, self.pad)

    def _arrange(self, epoch: int) -> None:
        """The order of the documents in this epoch and where each ends in it."""
        if epoch != self._epoch:
            self._documents = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.lengths))
            self._ends = np.cumsum(self.lengths[self._documents])
            self._epoch = epoch

    def collate(self, rows: Sequence[Row]) -> dict:
        return stack(rows)


class WholeDocuments:
    """Documents kept whole, put together by best fit (the longest first, each into the fullest row that has room).

    Documents of which nothing is trained on, cut to `length`, are left out.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int, pad: int = 0):
        self.stream, self.length, self.pad = stream, length, pad
        lengths = np.minimum(np.diff(np.asarray(stream.offsets)), length)
        self.bins = best_fit(lengths, length, _useful(stream, length))
        self.rows = Order(len(self.bins), seed)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Row:
        pieces = []
        for document in self.bins[self.rows(index)[1]]:
            start, end = int(self.stream.offsets[document]), int(self.stream.offsets[document + 1])
            pieces.append((start, min(end, start + self.length), start))
        return _row(self.stream, pieces, self.length, self.pad)

    def collate(self, rows: Sequence[Row]) -> dict:
        return stack(rows)


class MixedRows:
    """Rows of several parts in proportion to their shares, to about a row over any blocks; shuffled inside a block."""

    BLOCK = 1024

    def __init__(self, parts: Sequence[Rows], shares: Sequence[float], seed: int):
        self.parts, self.seed = list(parts), seed
        self.turns = Evenly(shares)
        self._block = -1
        self._which = np.zeros(0, np.int64)
        self._number = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Row:
        block, place = divmod(index, self.BLOCK)
        self._arrange(block)
        return self.parts[int(self._which[place])][int(self._number[place])]

    def _arrange(self, block: int) -> None:
        """Which part gives each row of the block, and the row's number in that part."""
        if block == self._block:
            return
        before, after = self.turns.before(block * self.BLOCK), self.turns.before((block + 1) * self.BLOCK)
        which = np.repeat(np.arange(len(self.parts)), after - before)
        which = np.random.default_rng([self.seed, block, 2]).permutation(which)
        number = np.zeros(len(which), np.int64)
        for part in range(len(self.parts)):
            number[which == part] = np.arange(before[part], after[part])
        self._block, self._which, self._number = block, which, number

    def collate(self, rows: Sequence[Row]) -> dict:
        return stack(rows)


class Mapped:
    """Rows changed on their way by `change(row, index)`, with their own `collate`."""

    def __init__(self, rows: Rows, change: Callable[[Row, int], Row], collate: Callable[[Sequence[Row]], dict] = stack):
        self.rows, self.change, self.collate = rows, change, collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.change(self.rows[index], index)


def best_fit(lengths: np.ndarray, room: int, useful: np.ndarray) -> list[list[int]]:
    """Which documents go together: bins of at most `room` tokens, by best-fit decreasing."""
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for document in np.argsort(-lengths, kind="stable"):
        size = int(lengths[document])
        if not useful[document]:
            continue
        place = bisect_left(open_bins, (size, -1))
        if place == len(open_bins):
            bins.append([int(document)])
            left, chosen = room - size, len(bins) - 1
        else:
            left, chosen = open_bins.pop(place)
            bins[chosen].append(int(document))
            left -= size
        if left > 1:
            insort(open_bins, (left, chosen))
    return bins


def _useful(stream: TokenStream, length: int) -> np.ndarray:
    """[documents] bool: something is trained on within the first `length` tokens."""
    if stream.trained is None:
        return np.diff(np.asarray(stream.offsets)) > 1
    return np.array([stream.document(d)[1][:length].any() for d in range(stream.documents)], dtype=bool)


def _row(stream: TokenStream, pieces: list[tuple[int, int, int]], length: int, pad: int) -> Row:
    """One row from pieces (start, end, start of the document) of the stream, padded at its end."""
    ids = np.full(length, pad, np.int64)
    segments = np.full(length, -1, np.int64)
    positions = np.zeros(length, np.int64)
    trained = np.zeros(length, bool)
    place = 0
    for segment, (start, end, first) in enumerate(pieces):
        here = slice(place, place + end - start)
        ids[here] = stream.ids[start:end]
        segments[here] = segment
        positions[here] = np.arange(end - start)
        trained[here] = stream.trained_between(start, end, first)
        trained[place] = False
        place = here.stop
    return {"input_ids": ids, "segments": segments, "positions": positions, "trained": trained}
