"""X-LoRA over the adapters of a model: a classifier says how much each counts (Buehler & Buehler 2024, 2402.07148)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Mixture, Point


class Settings(Mixture):
    """Learns for each token how much a model's LoRA adapters count, from the frozen model's last hidden states."""

    adapters: Annotated[list[str], Field(description="Which of them; none named: all that are active.")] = []


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    how = Mixture(**settings.model_dump(exclude={"adapters"}))
    return [Point(form="mixture", on=["adapters"], of=settings.adapters, mixture=how)]
