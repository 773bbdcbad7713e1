"""Which member of a mixture over bytes speaks at which character of a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.fitting import reader_of
from graft.ensemble.byte_level.model import EnsembleOverBytes
from graft.ensemble.byte_level.scorer import score
from graft.ensemble.sources import Source
from graft.ensemble.spoken import Spoken


def speaks(model: EnsembleOverBytes, text: str) -> Spoken:
    """Who speaks in `text`, a character a token."""
    names = [str(model.config.members[place]["name"]) for place in model.active]
    return _spoken(names, model.weights.numpy(), [_gold(reader, text) for reader in model.readers], text)


def spoken_by(
    sources: Sequence[Source], weights: Sequence[float], cover: Cover, text: str, device: str | None = None
) -> Spoken:
    """Who speaks in `text` where these members are mixed, one after the other in memory."""
    gold = [_gold(reader_of(source, cover, device), text) for source in sources]
    return _spoken([source.name for source in sources], np.asarray(weights), gold, text)


def _gold(reader: ByteModel, text: str) -> np.ndarray:
    return score(reader, [text])[0].log_probs


def _spoken(names: Sequence[str], weights: np.ndarray, gold: Sequence[np.ndarray], text: str) -> Spoken:
    """`gold`: of each member `[bytes]` log-probabilities. A character's share is the mean of its bytes' shares, what a
    member gives it the product of what it gives them; a byte that no member can write is shared by weight."""
    parts = np.exp(np.stack(gold, -1)) * weights
    total = parts.sum(-1, keepdims=True)
    shares = np.where(total > 0, parts / np.where(total > 0, total, 1), weights / weights.sum())
    sizes = np.array([len(letter.encode("utf-8", "surrogatepass")) for letter in text])
    starts = np.cumsum(sizes) - sizes
    return Spoken(
        tuple(names),
        tuple(text),
        np.add.reduceat(shares, starts) / sizes[:, None],
        np.broadcast_to(weights, (len(text), len(weights))),
        np.exp(np.add.reduceat(np.stack(gold, -1), starts)),
    )
