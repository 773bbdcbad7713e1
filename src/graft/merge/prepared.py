"""What a method that looks at models or data finds out before the weights are streamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def as_written(settings: MergeSettings) -> dict[str, Any]:
    """The settings that say how a merge is written and not what it is."""
    return {"dtype": settings.dtype, "force": settings.force, "shard": settings.shard}
