"""A greedy soup: models are added one by one, and only those stay that do not make the mean worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from graft.merge.judged import NeedsData
from graft.merge.prepared import ChoosingSettings, Prepared, as_written
from graft.merge.settings import MergeSettings
from graft.settings import ModelRef

if TYPE_CHECKING:
    from graft.verb import Job


class Settings(ChoosingSettings, NeedsData):
    """The mean of the models that help: the best one, then each of the others, best first, that does not make the mean
    of those already taken worse on held-out data."""

    method: Literal["greedy_soup"] = "greedy_soup"
    models: Annotated[list[ModelRef], Field(min_length=1, description="Models; none weighs more.")]
    jobs: Annotated[int, Field(ge=1, description="Models judged side by side at first, each in a process.")] = 1


@dataclass(frozen=True)
class Decision:
    """Whether a model went into the soup, and the losses with and without it."""

    model: str
    loss: float
    before: float | None
    taken: bool


def choose(names: Sequence[str], alone: Sequence[float], loss: Callable[[list[str]], float]) -> list[Decision]:
    """Recipe 1 of Wortsman et al. 2022 (arXiv:2203.05482), with losses for accuracies.

    `alone` are the losses of the models, `loss` gives that of the mean of several. The first model, the best, is taken
    without being asked; a later one if the mean with it is not worse than without.
    """
    order = sorted(range(len(names)), key=lambda index: alone[index])
    best, *others = order
    decisions = [Decision(names[best], alone[best], None, True)]
    soup, before = [names[best]], alone[best]
    for index in others:
        found = loss([*soup, names[index]])
        taken = found <= before
        decisions.append(Decision(names[index], found, before, taken))
        if taken:
            soup.append(names[index])
            before = found
    return decisions


def prepare(job: Job, settings: Settings) -> Prepared:
    """Judges each model and then the soups; what is merged is the mean of the chosen ones, best first."""
    from graft.merge.candidates import Candidates

    with Candidates(job, settings, settings.jobs) as candidates:
        sign = -1 if candidates.judge.higher_is_better else 1
        alone = candidates.losses([mean(settings, [name]) for name in settings.names])
        made = choose(settings.names, alone, lambda names: candidates.losses([mean(settings, names)])[0])
        metric = candidates.judge.metric
    scores = dict(zip(settings.names, alone, strict=True))
    told: list[dict[str, Any]] = [
        {
            "model": one.model,
            "alone": _finite(sign * scores[one.model]),
            "without": None if one.before is None else _finite(sign * one.before),
            "with": _finite(sign * one.loss),
            "taken": one.taken,
        }
        for one in made
    ]
    chosen = mean(settings, [one.model for one in made if one.taken])
    return Prepared(chosen, {"greedy_soup": {"metric": metric, "on": settings.data, "decisions": told}})


def mean(settings: MergeSettings, names: Sequence[str]) -> MergeSettings:
    """The plain mean of some of the models, written as `settings` say."""
    from graft.merge import uniform_soup

    return uniform_soup.Settings(models=list(names), **as_written(settings))


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
