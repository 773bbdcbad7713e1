"""The straight lines between the models of a merge: how the measure runs along them, and how high the hill is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup

from graft.report.read import Model, Run, is_number
from graft.report.series import plot


@dataclass(frozen=True)
class Way:
    """The measure along one line: (share of the second model, value), and the height of the hill, if that is known."""

    name: str
    barrier: float | None
    points: Sequence[tuple[float, float]]

    def __str__(self) -> str:
        return f"{self.name} ({'–' if self.barrier is None else f'{self.barrier:.3f}'})"


@dataclass(frozen=True)
class Hills:
    """The lines that were measured for one merge."""

    merge: str
    metric: str
    on: str
    lines: Sequence[Way]

    @property
    def picture(self) -> Markup:
        """All lines in one drawing."""
        words = f"{self.metric} along the straight lines between the models of {self.merge}"
        return plot({str(way): list(way.points) for way in self.lines}, words, across="share of the second")

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def hills(run: Run) -> Iterator[Hills]:
    """Of every merge whose manifest has lines: between its models as they are, or before and after alignment."""
    for model in run.models.values():
        notes = model.manifest.get("notes") or {}
        for metric, on, lines in (*_barriers(notes), *_alignments(model, notes)):
            if drawn := [way for way in lines if way.points]:
                yield Hills(model.name, metric.replace("_", " "), on, drawn)


Measured = tuple[str, str, list[Way]]
"""(metric, data, lines)."""


def _barriers(notes: Mapping[str, Any]) -> Iterator[Measured]:
    found = notes.get("barriers")
    if found:
        lines = [Way(" – ".join(e["between"]), e["barrier"], _points(e["values"])) for e in found["lines"]]
        yield found["metric"], ", ".join(found["on"]), lines


def _alignments(model: Model, notes: Mapping[str, Any]) -> Iterator[Measured]:
    found = notes.get("alignment") or {}
    lines = [
        Way(f"{found['to']} – {name} {when}", each[f"barrier_{when}"], _points(each[f"line_{when}"]))
        for name, each in found.get("models", {}).items()
        for when in ("before", "after")
        if f"line_{when}" in each
    ]
    if lines:
        on = (model.manifest.get("settings") or {}).get("on") or ""
        metric = next(each["metric"] for each in found["models"].values() if "metric" in each)
        yield metric, on if isinstance(on, str) else ", ".join(on), lines


def _points(values: Sequence[float | None]) -> list[tuple[float, float]]:
    """The models lie evenly on the way."""
    shares = [place / max(len(values) - 1, 1) for place in range(len(values))]
    return [(share, value) for share, value in zip(shares, values, strict=True) if is_number(value)]
