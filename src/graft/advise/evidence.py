"""The table that advice rests on, `evidence.yaml`: who measured which method, on what, beside full tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from graft.settings import Settings, parse

Task = Literal["classification", "generation", "instructions", "text", "packed"]

ALIKE = 10.0
"""Studies on models whose size differs from the one in question by this many times more than that of the nearest study
do are left aside: models of 5 million parameters tell little of those of 500 million, and the other way round."""
NEAR = 5.0
"""Shares of parameters that differ by more than this factor tell little of each other."""


class Score(Settings):
    """One method in a study."""

    method: str
    share: Annotated[float, Field(gt=0, description="Trained parameters, percent of the model's.")]
    score: float


class Study(Settings):
    """Methods on one task, model and data set, and full tuning beside them."""

    task: Task
    data: str
    rows: int
    model: str
    parameters: Annotated[int, Field(gt=0, description="Of the model, about.")]
    architecture: Literal["decoder", "encoder", "encoder-decoder"]
    metric: str
    better: Literal["higher", "lower"] = "higher"
    full: Annotated[float, Field(gt=0, description="The score of full tuning.")]
    source: str
    here: Annotated[bool, Field(description="Measured with graft itself.")] = False
    scores: list[Score]

    def kept(self, score: float) -> float:
        """A score as a share of what full tuning reaches; where less is better the other way round."""
        return score / self.full if self.better == "higher" else self.full / score

    def nearest(self, method: str, share: float) -> Score | None:
        """The method at the share nearest to `share` (percent); None where the study does not have the method."""
        own = [score for score in self.scores if score.method == method]
        return min(own, key=lambda score: abs(math.log(score.share / share)), default=None)


class Claim(Settings):
    """What a source found, in words."""

    tasks: list[Task]
    prefers: str
    says: str
    on: str
    source: str
    here: bool = False


class Evidence(Settings):
    """The whole table."""

    studies: list[Study]
    claims: list[Claim]


@dataclass(frozen=True)
class Standing:
    """How a method stood to full tuning: the mean over studies, each at the share nearest to the one in question."""

    kept: float
    """Of what full tuning reaches; 1: as good."""
    figures: tuple[str, ...]
    """Each figure in words, with its source."""
    far: bool
    """Whether all of them are at other shares of parameters, by more than a factor of NEAR."""
    here: bool
    """Whether any was measured with graft itself."""


@cache
def evidence() -> Evidence:
    """The table of the package."""
    from graft.yaml_lines import read_yaml

    document = read_yaml((Path(__file__).parent / "evidence.yaml").read_text(encoding="utf-8"))
    return parse(Evidence, document.value, ("evidence",))


def alike(studies: Sequence[Study], parameters: int) -> list[Study]:
    """The studies on models nearest in size to one of so many parameters."""
    away = [max(study.parameters / parameters, parameters / study.parameters) for study in studies]
    return [study for study, far in zip(studies, away, strict=True) if far <= ALIKE * min(away)]


def standing(studies: Sequence[Study], method: str, share: float) -> Standing | None:
    """How `method` stood at about `share` percent of the parameters; None where no study has it."""
    found = [(study, score) for study in studies if (score := study.nearest(method, share)) is not None]
    if not found:
        return None
    close = [(study, score) for study, score in found if max(score.share / share, share / score.share) <= NEAR]
    taken = close or found
    kept = sum(study.kept(score.score) for study, score in taken) / len(taken)
    return Standing(kept, tuple(_words(*each) for each in taken), not close, any(study.here for study, _ in taken))


def _words(study: Study, score: Score) -> str:
    where = f"measured with graft: {study.source}" if study.here else study.source
    return (
        f"{study.metric} {score.score:g}, full tuning {study.full:g}, with {score.share:g} % of {study.model} on "
        f"{study.data} ({where})"
    )
