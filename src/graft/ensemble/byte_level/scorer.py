"""The log-probability of texts byte by byte, so that models with any tokenizers are scored on the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graft.allocator import memory_kept, unsearched
from graft.ensemble.byte_level import known
from graft.ensemble.byte_level.byte_model import ByteModel
from graft.ensemble.byte_level.cover import END, State
from graft.ensemble.byte_level.following import MOST, Note
from graft.ensemble.byte_level.forest import Forest
from graft.products import quick_layers
from graft.progress import Progress


@dataclass(frozen=True)
class ByteDocument:
    """`log_probs [bytes] float64`: natural log of the probability of each byte behind those before it. `lost`: the
    exact log-probability of the text is at least their sum less this, for what was dropped on the way."""

    log_probs: np.ndarray
    lost: float

    @property
    def bytes(self) -> int:
        """How many there are."""
        return len(self.log_probs)

    @property
    def bits(self) -> float:
        """Bits for the whole text."""
        return float(-self.log_probs.sum() / np.log(2))


ROWS = 16
"""Texts that are read at the same time."""
HELD = 2**25
"""Log-probabilities of tokens that are read ahead, of all texts that are read at the same time."""


def bytes_of(text: str) -> bytes:
    """A text's bytes, broken surrogates included."""
    return text.encode("utf-8", "surrogatepass")


@memory_kept()
@quick_layers()
@unsearched()
def score(model: ByteModel, texts: Sequence[str | bytes]) -> list[ByteDocument]:
    """The log-probability of every byte of every text; -inf for a byte that the model's tokens cannot write."""
    data = [text if isinstance(text, bytes) else bytes_of(text) for text in texts]
    made: dict[int, ByteDocument] = {}
    with Progress("scoring", sum(map(len, data)), "bytes") as progress:
        for rows in _batches(model, data):
            part = [data[row] for row in rows]
            made |= zip(rows, _documents(model, part), strict=True)
            progress.advance(sum(map(len, part)))
    return [made[row] for row in range(len(data))]


def _batches(model: ByteModel, data: Sequence[bytes]) -> list[list[int]]:
    """Texts that are about as long together."""
    rows = min(ROWS, max(1, HELD // (MOST * model.reader.size)))
    order = sorted(range(len(data)), key=lambda row: len(data[row]))
    return [order[begin : begin + rows] for begin in range(0, len(order), rows)]


def _documents(model: ByteModel, texts: Sequence[bytes]) -> list[ByteDocument]:
    if not known.serves(model):
        return followed(model, texts)
    walks = known.walked(model, texts)
    failed = [number for number, walk in enumerate(walks) if walk.failed]
    again = iter(followed(model, [texts[number] for number in failed]) if failed else ())
    return [next(again) if walk.failed else ByteDocument(walk.gold, walk.lost) for walk in walks]


def followed(model: ByteModel, texts: Sequence[bytes]) -> list[ByteDocument]:
    """The same with a state behind each byte, which serves every model and text."""
    golds = [np.empty(len(text)) for text in texts]
    forest = Forest(model.reader, len(texts))
    states = model.begin(forest, range(len(texts)))
    lasts = model.follow(forest, states, [text[:-1] for text in texts], [_noting(gold) for gold in golds])
    for gold, text, last in zip(golds, texts, lasts, strict=True):
        if text:
            gold[-1] = model.chance(last, text[-1])
    return [ByteDocument(gold, last.lost) for gold, last in zip(golds, lasts, strict=True)]


def _noting(gold: np.ndarray) -> Note:
    """What writes down the log-probability of each byte."""

    def note(place: int, state: State) -> None:
        gold[place] = state.step

    return note


@memory_kept()
@quick_layers()
@unsearched()
def distributions(model: ByteModel, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`[bytes, 257] float64` of each text: what the model gives each byte (and the end) before it comes."""
    made: dict[int, np.ndarray] = {}
    for rows in _batches(model, texts):
        part = [texts[row] for row in rows]
        forest = Forest(model.reader, len(part))
        states = model.begin(forest, range(len(part)))
        found = [np.empty((len(text), END + 1)) for text in part]
        for nexts, state in zip(found, states, strict=True):
            nexts[:1] = state.next
        model.follow(forest, states, [text[:-1] for text in part], [_spreading(nexts) for nexts in found])
        made |= zip(rows, found, strict=True)
    return [made[row] for row in range(len(texts))]


def _spreading(nexts: np.ndarray) -> Note:
    """What writes down the next byte's probabilities behind each byte."""

    def note(place: int, state: State) -> None:
        nexts[place + 1] = state.next

    return note
