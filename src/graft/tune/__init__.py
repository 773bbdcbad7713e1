"""Tuning: a model trained further, on any data format. One file a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.errors import CannotCombine, Problem, SettingsError
from graft.methods import method, method_names
from graft.settings import Settings, parse
from graft.tune.settings import TuneSettings
from graft.verb import Estimate, Facts, Job, Verb

ROOMS = ("settings", "work")


class Tune(Verb[TuneSettings]):
    """Trains a model further."""

    name = "tune"
    summary = "Train a model further on a data set."

    def types(self) -> Mapping[str, type[Settings]]:
        return {
            "tune": TuneSettings,
            **{name: method("graft.tune", name).Settings for name in method_names("graft.tune")},
        }

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> TuneSettings:
        settings = parse(TuneSettings, raw, path)
        if len(settings.method) != 1:
            found = ", ".join(settings.method) or "none"
            raise SettingsError([Problem((*path, "method"), f"expected one method, found {found}")])
        ((name, options),) = settings.method.items()
        resolved = parse(method("graft.tune", name).Settings, options or {}, (*path, "method", name))
        return settings.model_copy(update={"method": {name: resolved.plain()}})

    def check(self, settings: TuneSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.data.objectives import objective_for

        start = models[settings.from_]
        if not start.mergeable:
            return [f"{settings.from_} has no weights of its own to tune: tune its members, or distil it"]
        try:
            objective_for(start.architecture, settings.objective)
        except CannotCombine as error:
            return [str(error)]
        return []

    def facts(self, settings: TuneSettings, models: Mapping[str, Facts], key: str) -> Facts:
        return models[settings.from_]

    def estimate(self, settings: TuneSettings, models: Mapping[str, Facts]) -> Estimate:
        from graft.train.estimate import training_estimate

        start = models[settings.from_]
        length = settings.length or min(int(start.config.get("max_position_embeddings", 512)), 1024)
        return training_estimate(start.parameters, settings, length)

    def run(self, job: Job) -> dict[str, Any]:
        from graft.tune.work import run

        return run(job)


VERB = Tune()
__all__ = ["VERB", "TuneSettings"]
