"""The straight lines between the models of a merge: how the measure runs along them, and how high the hill is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from graft.report.read import Model, Run, is_number
from graft.report.series import plot


@dataclass(frozen=True)
class Hills:
    """The lines that were measured for one merge."""

    merge: str
    metric: str
    on: str
    picture: Markup


def hills(run: Run) -> Iterator[Hills]:
    """Of every merge whose manifest has lines: between its models as they are, or before and after alignment."""
    for model in run.models.values():
        notes = model.manifest.get("notes") or {}
        for metric, on, lines in (*_barriers(notes), *_alignments(model, notes)):
            drawn = {name: points for name, points in lines.items() if points}
            if drawn:
                words = f"{metric.replace('_', ' ')} along the straight lines between the models of {model.name}"
                yield Hills(model.name, metric.replace("_", " "), on, plot(drawn, words, across="share of the second"))


Measured = tuple[str, str, dict[str, list[tuple[float, float]]]]
"""(metric, data, points of each line by its name)."""


def _barriers(notes: Mapping[str, Any]) -> Iterator[Measured]:
    found = notes.get("barriers")
    if found:
        lines = {_named(" – ".join(e["between"]), e["barrier"]): _points(e["values"]) for e in found["lines"]}
        yield found["metric"], ", ".join(found["on"]), lines


def _alignments(model: Model, notes: Mapping[str, Any]) -> Iterator[Measured]:
    found = notes.get("alignment") or {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, each in found.get("models", {}).items():
        for when in ("before", "after"):
            if f"line_{when}" in each:
                named = _named(f"{found['to']} – {name} {when}", each[f"barrier_{when}"])
                lines[named] = _points(each[f"line_{when}"])
    if lines:
        on = (model.manifest.get("settings") or {}).get("on") or ""
        metric = next(each["metric"] for each in found["models"].values() if "metric" in each)
        yield metric, on if isinstance(on, str) else ", ".join(on), lines


def _named(line: str, barrier: float | None) -> str:
    return f"{line} ({'–' if barrier is None else f'{barrier:.3f}'})"


def _points(values: Sequence[float | None]) -> list[tuple[float, float]]:
    """The models lie evenly on the way."""
    shares = [place / max(len(values) - 1, 1) for place in range(len(values))]
    return [(share, value) for share, value in zip(shares, values, strict=True) if is_number(value)]
