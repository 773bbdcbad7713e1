"""The log-probability of texts byte by byte, so that models with any tokenizers are scored on the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graft.ensemble.byte_level.byte_model import ByteModel
from graft.ensemble.byte_level.cover import END, State
from graft.ensemble.byte_level.forest import Forest
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


def score(model: ByteModel, texts: Sequence[str | bytes]) -> list[ByteDocument]:
    """The log-probability of every byte of every text; -inf for a byte that the model's tokens cannot write."""
    made = []
    data = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in texts]
    with Progress("scoring", sum(map(len, data)), "bytes") as progress:
        for text in data:
            made.append(_document(model, text))
            progress.advance(len(text))
    return made


def _document(model: ByteModel, text: bytes) -> ByteDocument:
    gold = np.empty(len(text))

    def note(place: int, state: State) -> None:
        gold[place] = state.step

    forest = Forest(model.reader)
    last = model.follow(forest, model.begin(forest), text[:-1], note)
    if text:
        gold[-1] = model.chance(last, text[-1])
    return ByteDocument(gold, last.lost)


def distributions(model: ByteModel, text: bytes) -> np.ndarray:
    """`[bytes, 257] float64`: what the model gives each byte of a text (and the end) before it comes."""
    forest = Forest(model.reader)
    state = model.begin(forest)
    nexts = np.empty((len(text), END + 1))
    nexts[:1] = state.next

    def note(place: int, state: State) -> None:
        nexts[place + 1] = state.next

    model.follow(forest, state, text[:-1], note)
    return nexts
