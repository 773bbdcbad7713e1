"""A vote: of classifiers the class with most votes, of writers the answer that most of them give.

For classifiers the ensemble's probability of a class is its share of the votes. For writers it is self-consistency
(Wang et al. 2023) over members: each writes its answers, and one of the commonest is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graft.ensemble import voting
from graft.ensemble.linear import problem
from graft.ensemble.settings import OutputSettings

if TYPE_CHECKING:
    import torch

__all__ = ["Settings", "choose", "combine", "default", "problem"]


class Settings(OutputSettings):
    """What the members write, where they write; classifiers need none of it."""


def default(members: int, options: Settings) -> list[float]:
    """Equal weights."""
    return [1 / members] * members


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor, options: Settings) -> torch.Tensor:
    """The log of each class's share of the votes, `[..., classes]` from `[..., classes] float32` each."""
    return voting.shares(log_probs, weights, _vote)


def _vote(log_probs: torch.Tensor) -> torch.Tensor:
    """One for the class that is likeliest, the first of several."""
    import torch

    return torch.nn.functional.one_hot(log_probs.argmax(-1), log_probs.shape[-1]).to(log_probs.dtype)


def choose(outputs: Sequence[Sequence[str]], weights: Sequence[float], options: Settings) -> int:
    """Which answer is given: its place in all `outputs` (each member's answers) one behind the other."""
    texts, counts = voting.flat(outputs, weights)
    return texts.index(voting.majority(texts, counts))
