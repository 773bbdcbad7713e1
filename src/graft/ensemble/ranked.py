"""A ranked vote (Borda's count): each member gives an answer or a class as many points as it puts behind it.

For classifiers the ensemble's probability of a class is its share of the points. For writers the members' beams are
their rankings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from graft.ensemble import voting
from graft.ensemble.linear import problem
from graft.ensemble.settings import OutputSettings

if TYPE_CHECKING:
    import torch

__all__ = ["Settings", "choose", "combine", "default", "problem"]


class Settings(OutputSettings):
    """What the members write, where they write; classifiers need none of it."""

    candidates: Annotated[int, Field(gt=1, description="Answers that each member writes and ranks.")] = 4


def default(members: int, options: Settings) -> list[float]:
    """Equal weights."""
    return [1 / members] * members


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor, options: Settings) -> torch.Tensor:
    """The log of each class's share of the points, `[..., classes]` from `[..., classes] float32` each."""
    points = [each.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).to(each.dtype) for each in log_probs]
    return voting.shares(points, weights)


def choose(outputs: Sequence[Sequence[str]], weights: Sequence[float], options: Settings) -> int:
    """Which answer is given: its place in all `outputs` (each member's, best first) one behind the other."""
    best = voting.ranked([list(dict.fromkeys(each)) for each in outputs], weights)[0]
    return voting.flat(outputs, weights)[0].index(best)
