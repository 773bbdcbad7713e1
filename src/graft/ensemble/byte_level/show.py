"""Which member of an ensemble over bytes speaks at which character of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.fitting import reader_of
from graft.ensemble.byte_level.model import EnsembleOverBytes
from graft.ensemble.byte_level.scorer import bytes_of, distributions
from graft.ensemble.gate import Gate, Told
from graft.ensemble.pulls import pulls
from graft.ensemble.sources import Source
from graft.ensemble.spoken import Spoken


def speaks(model: EnsembleOverBytes, text: str) -> Spoken:
    """Who speaks in `text`, a character a token."""
    names = [str(model.config.members[place]["name"]) for place in model.active]
    told = [_told(reader, text) for reader in model.readers]
    weights = model.weights.cpu()
    if model.config.combine == "linear":
        return _spoken(names, weights, model.gate, told, text)
    return _pulling(names, weights, told, model.mixed([Told(each) for each in told], weights, None), text)


def spoken_by(
    sources: Sequence[Source],
    weights: Sequence[float],
    gate: dict[str, Any] | None,
    cover: Cover,
    text: str,
    device: str | None = None,
    combine: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor] | None = None,
) -> Spoken:
    """Who speaks in `text` where these members are mixed, or where there is a rule to `combine` them by make a product;
    one after the other in memory."""
    told = [_told(reader_of(source, cover, device), text) for source in sources]
    names = [source.name for source in sources]
    if combine is not None:
        constant = torch.tensor(weights)
        return _pulling(names, constant, told, combine(told, constant), text)
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
    sizes, starts = _letters(text)
    return Spoken(
        tuple(names),
        tuple(text),
        np.add.reduceat(shares, starts) / sizes,
        np.add.reduceat(weights, starts) / sizes,
        np.exp(np.add.reduceat(gold, starts)),
    )


def _pulling(
    names: Sequence[str], weights: torch.Tensor, told: Sequence[torch.Tensor], mixed: torch.Tensor, text: str
) -> Spoken:
    """The same of a product, from its members' log-probabilities and its own, `mixed [bytes, 257]`. A member pulls
    towards a character as far as towards all of its bytes together."""
    gold = torch.tensor(list(bytes_of(text)))[:, None]
    pulled = pulls(told, mixed, weights, gold).double().numpy()
    given = np.concatenate([each.gather(-1, gold).double().numpy() for each in told], -1)
    _, starts = _letters(text)
    return Spoken(
        tuple(names),
        tuple(text),
        np.add.reduceat(pulled, starts),
        weights.double().expand(len(text), -1).numpy(),
        np.exp(np.add.reduceat(given, starts)),
        product=True,
    )


def _letters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """How many bytes each character has, `[characters, 1]`, and which is its first, `[characters]`."""
    sizes = np.array([len(bytes_of(letter)) for letter in text])
    return sizes[:, None], np.cumsum(sizes) - sizes
