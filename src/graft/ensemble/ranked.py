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
    return voting.shares(log_probs, weights, _points)


def _points(log_probs: torch.Tensor) -> torch.Tensor:
    """How many classes are less likely; those that are equally likely share their places evenly."""
    import torch

    ordered, values = log_probs.sort(dim=-1).values, log_probs.contiguous()
    less, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (less + up_to - 1).to(log_probs.dtype) / 2


def choose(outputs: Sequence[Sequence[str]], weights: Sequence[float], options: Settings) -> int:
    """Which answer is given: its place in all `outputs` (each member's, best first) one behind the other."""
    best = voting.ranked([list(dict.fromkeys(each)) for each in outputs], weights)[0]
    return voting.flat(outputs, weights)[0].index(best)
