"""AdapterFusion: attention over the adapters of a model, for each token (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Point
from graft.settings import Settings as Base


class Settings(Base):
    """Learns which of a model's adapters to listen to, at every place and token; the adapters stay as they are."""

    adapters: Annotated[list[str], Field(description="Which of them; none named: all that are active.")] = []


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [Point(form="fusion", on=["adapters"], of=settings.adapters)]
