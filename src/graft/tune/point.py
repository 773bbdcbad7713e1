"""Any point of the design space of adapters, or several at once, as written in the recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from graft.adapters.point import Point
from graft.settings import Settings as Base


class Settings(Base):
    """One point (`{form: …, on: …}`), or several of them under `points`."""

    points: Annotated[list[Point], Field(min_length=1, description="The points, in the order they are applied.")]

    @model_validator(mode="before")
    @classmethod
    def _one(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "points" not in raw:
            return {"points": [raw]}
        return {"points": raw} if isinstance(raw, list) else raw


def points(settings: Settings) -> list[Point]:
    """The points as they were written."""
    return settings.points
