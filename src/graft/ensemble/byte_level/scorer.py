"""The log-probability of texts byte by byte, so that models with any tokenizers are scored on the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graft.ensemble.byte_level.byte_model import ByteModel
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
            before, lost = distributions(model, text)
            with np.errstate(divide="ignore"):
                gold = np.log(before[np.arange(len(text)), np.frombuffer(text, np.uint8)])
            made.append(ByteDocument(gold, lost))
            progress.advance(len(text))
    return made


def distributions(model: ByteModel, text: bytes) -> tuple[np.ndarray, float]:
    """`[bytes, 257] float64`: what the model gives each byte of a text (and the end) before it comes; the nats lost."""
    forest = Forest(model.reader)
    state = model.begin(forest)
    first = state.next[None]
    behind, last = model.follow(forest, state, text[:-1])
    return np.concatenate([first, behind])[: len(text)], last.lost
