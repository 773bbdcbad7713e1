"""One task's head of a model that was tuned on several, as an ordinary model of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from graft.adapters.facts import is_adapted
from graft.settings import ModelRef, Settings, parse
from graft.train.memory import PROCESS
from graft.verb import Estimate, Facts, Job, Verb


class HeadSettings(Settings):
    """A head with its body: `{head: {from: multi, task: topic}}`."""

    from_: Annotated[ModelRef, Field(alias="from", description="A model that was tuned on tasks with heads.")]
    task: Annotated[str | None, Field(description="The task whose head it is; None: there is one only.")] = None


class Head(Verb[HeadSettings]):
    """Splits a head out."""

    name = "head"
    summary = "Split one task's head, with the body, out of a model tuned on several: an ordinary model."

    def types(self) -> Mapping[str, type[Settings]]:
        return {"head": HeadSettings}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> HeadSettings:
        return parse(HeadSettings, raw, path)

    def check(self, settings: HeadSettings, models: Mapping[str, Facts]) -> list[str]:
        heads = models[settings.from_].heads
        there = ", ".join(heads) or "none: tune it on `tasks` with a `head`"
        if is_adapted(models[settings.from_]):
            return [
                f"{settings.from_} is an adapter that lies apart, and its heads with it (heads/TASK loads as it is): a "
                "whole model with one head needs the adapter folded (`fold: true`)"
            ]
        if settings.task is not None and settings.task not in heads:
            return [f"expected a head of {settings.from_}, found the task {settings.task!r}; it has {there}"]
        if settings.task is None and len(heads) != 1:
            return [f"expected `task`, where a model has not one head; {settings.from_} has {there}"]
        return []

    def facts(self, settings: HeadSettings, models: Mapping[str, Facts], key: str) -> Facts:
        start = models[settings.from_]
        own = {task: kind for task, kind in start.heads.items() if settings.task in (None, task)}
        return replace(start, architecture="encoder", heads=own, folder="")

    def estimate(self, settings: HeadSettings, models: Mapping[str, Facts]) -> Estimate:
        start = models[settings.from_]
        return Estimate(start.parameters, start.bytes, PROCESS + start.bytes, 1.0, "no training")

    def run(self, job: Job) -> dict[str, Any]:
        from graft import models
        from graft.multitask.folder import find_head

        settings = job.settings
        assert isinstance(settings, HeadSettings)
        found = find_head(job.models[settings.from_], task=settings.task)
        models.save(models.load(found.folder), models.load_tokenizer(found.folder), job.out)
        return {"labels": list(found.labels)}


VERB = Head()
__all__ = ["VERB", "HeadSettings"]
