"""Which member of a mixture over bytes speaks at which character of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.fitting import reader_of
from graft.ensemble.byte_level.model import EnsembleOverBytes
from graft.ensemble.byte_level.scorer import bytes_of, distributions
from graft.ensemble.gate import Gate, Told
from graft.ensemble.sources import Source
from graft.ensemble.spoken import Spoken


def speaks(model: EnsembleOverBytes, text: str) -> Spoken:
    """Who speaks in `text`, a character a token."""
    names = [str(model.config.members[place]["name"]) for place in model.active]
    told = [_told(reader, text) for reader in model.readers]
    return _spoken(names, model.weights, model.gate, told, text)


def spoken_by(
    sources: Sequence[Source],
    weights: Sequence[float],
    gate: dict[str, Any] | None,
    cover: Cover,
    text: str,
    device: str | None = None,
) -> Spoken:
    """Who speaks in `text` where these members are mixed, one after the other in memory."""
    told = [_told(reader_of(source, cover, device), text) for source in sources]
    names = [source.name for source in sources]
    return _spoken(names, torch.tensor(weights), Gate.from_plain(gate) if gate else None, told, text)


def _told(reader: ByteModel, text: str) -> torch.Tensor:
    """`[bytes, 257] float32` log-probabilities before each byte."""
    (nexts,) = distributions(reader, [bytes_of(text)])
    return torch.from_numpy(nexts).log().float()


def _spoken(
    names: Sequence[str], constant: torch.Tensor, gate: Gate | None, told: Sequence[torch.Tensor], text: str
) -> Spoken:
    """`told`: of each member `[bytes, 257]` log-probabilities. A character's share is the mean of its bytes' shares, as
    its weight; what a member gives it is the product of what it gives them. A byte that no member can write is shared
    by weight."""
    data = list(bytes_of(text))
    decided = constant.expand(len(data), -1) if gate is None else gate.decide([Told(told[n]) for n in gate.looks_at])
    weights = decided.detach().double().numpy()
    gold = np.stack([each[range(len(data)), data].double().numpy() for each in told], -1)
    parts = np.exp(gold) * weights
    total = parts.sum(-1, keepdims=True)
    shares = np.where(total > 0, parts / np.where(total > 0, total, 1), weights / weights.sum(-1, keepdims=True))
    sizes = np.array([len(bytes_of(letter)) for letter in text])
    starts = np.cumsum(sizes) - sizes
    return Spoken(
        tuple(names),
        tuple(text),
        np.add.reduceat(shares, starts) / sizes[:, None],
        np.add.reduceat(weights, starts) / sizes[:, None],
        np.exp(np.add.reduceat(gold, starts)),
    )
