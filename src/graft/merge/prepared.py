"""What a method that looks at models or data finds out before the weights are streamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import model_validator

from graft.merge.settings import MergeSettings


@dataclass(frozen=True)
class Prepared:
    """What `prepare(job, settings)` of a method's file returns."""

    settings: MergeSettings
    """What is then merged: its `method` may be another one, its models fewer."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest."""
    survey: Any = None
    """Handed to the rule as `tensors.survey`."""
    models: Mapping[str, Path] | None = None
    """Where the models lie, if they are others than the job's."""


NOT_SHARED = ("method", "models", "slices", "search", "seeds", "barrier")


class ChoosingSettings(MergeSettings):
    """A merge that finds out itself which models, or how much of each, become another merge."""

    @model_validator(mode="after")
    def _chooses_alone(self) -> ChoosingSettings:
        for name in ("slices", "search"):
            if getattr(self, name):
                raise ValueError(f"expected no {name} beside {self.method}, which chooses by itself, found some")
        return self


def as_written(settings: MergeSettings) -> dict[str, Any]:
    """The settings that a merge of other models or by another method takes over: how it reads and writes."""
    return {name: getattr(settings, name) for name in MergeSettings.model_fields if name not in NOT_SHARED}
