"""Looking for the best parameters of a merge on held-out data: a grid, a golden section, or CMA-ES."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from graft.errors import RunError, SettingsError
from graft.merge.candidates import Candidates
from graft.merge.engine import prepare
from graft.merge.settings import MergeSettings
from graft.merge.space import Space, altered
from graft.verb import Job

GOLDEN = (5**0.5 - 1) / 2
SIGMA = 0.25
"""CMA-ES begins with this standard deviation, in shares of each range."""

Point = tuple[float, ...]
Look = Callable[[Sequence[Point]], list[float]]
"""Points of a cube in, what is to be made small out; fewer numbers than points where no more may be asked."""


def search(job: Job, settings: MergeSettings) -> tuple[MergeSettings, dict[str, Any]]:
    """The merge with the best parameters, and for the manifest what was tried.

    The merge as it is written is judged too, and stays where nothing is better. Raises RunError where no merge gives a
    finite number, CannotCombine and RequestError for models and data that cannot be judged.
    """
    asked = settings.search
    assert asked is not None
    space = Space(settings, asked)
    with Candidates(job, asked, asked.jobs) as candidates:
        look_beforehand(job, altered(settings, {}))
        trail = Trail(candidates, space, asked.evaluations)
        if asked.way == "grid":
            trail.look_at(grid(space))
        elif asked.way == "golden":
            golden(lambda points: trail.look_at([space.values(point) for point in points]))
        else:
            evolve(lambda points: trail.look_at([space.values(point) for point in points]), space.start(), job.seed)
        return trail.best(), trail.notes()


def look_beforehand(job: Job, settings: MergeSettings) -> None:
    """What the method measures before it merges, measured once: every candidate that it holds for finds it there."""
    prepared = prepare(replace(job, settings=settings), settings)
    if hasattr(prepared.survey, "close"):
        prepared.survey.close()


class Trail:
    """What has been tried: numbers, the merge with them, and how good it is."""

    def __init__(self, candidates: Candidates, space: Space, most: int):
        self.candidates, self.space, self.most = candidates, space, most
        self.tried: list[tuple[dict[str, Any], MergeSettings, float]] = []
        self._look([({}, altered(space.settings, {}))])

    def look_at(self, many: Sequence[Sequence[Any]]) -> list[float]:
        """The losses of the merges with these numbers, as far as the evaluations reach."""
        left = many[: self.most + 1 - len(self.tried)]
        found: list[tuple[dict[str, Any], MergeSettings | None]] = []
        for values in left:
            parameters = self.space.parameters(values)
            try:
                found.append((parameters, self.space.merge(values)))
            except SettingsError:
                # numbers that are right one by one and not together
                found.append((parameters, None))
        return self._look(found)

    def _look(self, many: Sequence[tuple[dict[str, Any], MergeSettings | None]]) -> list[float]:
        losses = iter(self.candidates.losses([merge for _, merge in many if merge is not None]))
        found = [float("inf") if merge is None else next(losses) for _, merge in many]
        written = self.space.settings
        self.tried += [(values, merge or written, loss) for (values, merge), loss in zip(many, found, strict=True)]
        return found

    def _first_best(self) -> tuple[dict[str, Any], MergeSettings, float]:
        return min(self.tried, key=lambda one: one[2])

    def best(self) -> MergeSettings:
        """The best merge, the first of equals. Raises RunError where none has a finite loss."""
        _, merge, loss = self._first_best()
        if loss == float("inf"):
            raise RunError("no merge that was tried gives finite predictions: look at the models and at the ranges")
        return merge

    def notes(self) -> dict[str, Any]:
        """For the manifest."""
        judge = self.candidates.judge
        sign = -1 if judge.higher_is_better else 1

        def value(loss: float) -> float | None:
            return None if loss == float("inf") else sign * loss

        parameters, _, loss = self._first_best()
        return {
            "by": self.space.search.way,
            "metric": judge.metric,
            "on": [subject.on for subject in judge.subjects],
            "as_written": value(self.tried[0][2]),
            "best": value(loss),
            "parameters": parameters,
            "tried": [{"parameters": each, judge.metric: value(loss)} for each, _, loss in self.tried[1:]],
        }


def grid(space: Space) -> list[list[Any]]:
    """Every combination of values at equal distances, as many as the evaluations allow, ends included."""
    axes = space.axes()
    return [list(point) for point in itertools.product(*axes)]


def golden(look: Look) -> None:
    """Golden-section search on [0, 1] until `look` gives no more: each step needs one evaluation (Kiefer 1953).

    Finds the least value where there is only one valley.
    """
    low, high = 0.0, 1.0
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    found = look([(left,), (right,)])
    while len(found) == 2:
        if found[0] <= found[1]:
            high, right = right, left
            left = high - GOLDEN * (high - low)
            found = [*look([(left,)]), found[0]]
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
            found = [found[1], *look([(right,)])]


def evolve(look: Look, start: Sequence[float], seed: int) -> None:
    """CMA-ES (Hansen 2016, arXiv:1604.00772) in the unit cube until `look` gives no more or the steps are tiny."""
    import numpy as np
    from cmaes import CMA

    bounds = np.array([[0.0, 1.0]] * len(start))
    optimizer = CMA(mean=np.array(start, float), sigma=SIGMA, bounds=bounds, seed=seed % 2**32)
    while not optimizer.should_stop():
        points = [optimizer.ask() for _ in range(optimizer.population_size)]
        losses = look([tuple(float(x) for x in point) for point in points])
        if len(losses) < len(points):
            return
        # only their order counts
        worst = np.finfo(float).max
        optimizer.tell([(point, min(loss, worst)) for point, loss in zip(points, losses, strict=True)])
