"""Rows that hold one document, or a piece of one: for models that cannot keep several apart, and encoder–decoders.

They differ in length; `PaddedCollate` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graft.data.corpus import nothing_to_learn
from graft.data.packing import MixedRows
from graft.data.rows import Order, Row, Rows
from graft.data.stream import TokenStream
from graft.errors import DataError

IGNORED = -100
"""Label of tokens that are not trained on."""


def pieces(streams: Sequence[tuple[TokenStream, float]], length: int, seed: int, *, whole: bool) -> Rows:
    """Documents cut into pieces of at most `length` tokens; `whole` keeps only the first piece of each."""
    return _mixed([PieceRows(s, length, seed + i, whole=whole) for i, (s, _) in enumerate(streams)], streams, seed)


def answers(
    streams: Sequence[tuple[TokenStream, float]], length: int, seed: int, *, keep_end: bool, start: int | None, end: int
) -> Rows:
    """Every run of trained tokens as a target, with what stands before it as its source."""
    parts = [AnswerRows(s, length, seed + i, keep_end, start, end) for i, (s, _) in enumerate(streams)]
    return _mixed(parts, streams, seed)


def _mixed(parts: Sequence[Rows], streams: Sequence[tuple[TokenStream, float]], seed: int) -> Rows:
    return parts[0] if len(parts) == 1 else MixedRows(parts, [share for _, share in streams], seed)


def _unpadded(rows: Sequence[Row]) -> dict:
    raise NotImplementedError("rows of different lengths: PaddedCollate puts them together")


class PieceRows:
    """`input_ids`, `segments` (zeros), `positions` and `trained`, each [n ≤ length]; shuffled anew in each epoch."""

    collate = staticmethod(_unpadded)

    def __init__(self, stream: TokenStream, length: int, seed: int, *, whole: bool):
        self.stream, self.length = stream, length
        sizes = np.diff(np.asarray(stream.offsets))
        if whole:
            counts = np.array([stream.document(d)[1][:length].any() for d in range(stream.documents)], np.int64)
        else:
            counts = -(-sizes // length)
        self.document = np.repeat(np.arange(len(sizes)), counts)
        self.piece = np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.order = Order(len(self.document), seed)

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, index: int) -> Row:
        place = self.order(index)[1]
        ids, trained = self.stream.document(int(self.document[place]))
        here = slice(int(self.piece[place]) * self.length, (int(self.piece[place]) + 1) * self.length)
        ids, trained = ids[here].astype(np.int64), trained[here].copy()
        trained[:1] = False  # nothing stands before it in this row
        return {
            "input_ids": ids,
            "segments": np.zeros(len(ids), np.int64),
            "positions": np.arange(len(ids)),
            "trained": trained,
        }


class AnswerRows:
    """`input_ids` (the source, with an end token) and `labels` (the target), at most `length` tokens each.

    A source that is too long loses its end, or with `keep_end` its beginning. A start token is left out: an encoder
    needs none.
    """

    collate = staticmethod(_unpadded)

    def __init__(self, stream: TokenStream, length: int, seed: int, keep_end: bool, start: int | None, end: int):
        self.stream, self.length, self.keep_end, self.start, self.end = stream, length, keep_end, start, end
        assert stream.trained is not None
        trained = np.concatenate([[0], stream.trained, [0]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(trained))
        self.first, self.last = edges[::2], edges[1::2]
        self.document = np.searchsorted(np.asarray(stream.offsets), self.first, side="right") - 1
        self.order = Order(len(self.first), seed)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Row:
        place = self.order(index)[1]
        first, last = int(self.first[place]), int(self.last[place])
        source = self.stream.ids[int(self.stream.offsets[self.document[place]]) : first].astype(np.int64)
        source = source[1:] if len(source) and source[0] == self.start else source
        room = self.length - 1
        source = source[max(0, len(source) - room) :] if self.keep_end else source[:room]
        target = self.stream.ids[first:last][: self.length].astype(np.int64)
        return {"input_ids": np.append(source, self.end), "labels": target}


class PaddedCollate:
    """Rows of different lengths padded behind: `input_ids`, `attention_mask`, `labels`, each [rows, longest] int64."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: Sequence[Row]) -> dict:
        import torch

        made = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad),
            "attention_mask": padded([np.ones(len(row["input_ids"]), np.int64) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
        return {name: torch.from_numpy(array) for name, array in made.items()}


def padded(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """[arrays, longest] int64, filled up behind."""
    made = np.full((len(arrays), max(map(len, arrays))), fill, np.int64)
    for place, array in enumerate(arrays):
        made[place, : len(array)] = array
    return made


def some(rows: Rows, streams: Sequence[tuple[TokenStream, float]], what: str, format: str, length: int) -> Rows:
    """The rows. Raises DataError where there are none."""
    if len(rows) > 0:
        return rows
    if any(stream.trained is None or stream.trained.any() for stream, _ in streams):
        raise DataError(f"{what}: nothing to train on within {length} tokens: every label is masked; raise `length`")
    raise DataError(f"{what}: {nothing_to_learn(format)}")
