"""Measuring: scores with intervals, paired comparisons, what it cost. Light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.evaluate.settings import (
    MEASURES,
    Measure,
    OnData,
    TaskMeasure,
    misfit,
    parse,
    parse_one,
    roomless,
    untakable,
)

__all__ = [
    "MEASURES",
    "Measure",
    "OnData",
    "TaskMeasure",
    "evaluate",
    "misfit",
    "parse",
    "parse_one",
    "roomless",
    "untakable",
]


def evaluate(
    models: Mapping[str, Path],
    measures: Sequence[Measure],
    *,
    data: Mapping[str, Any],
    root: Path,
    out: Path,
    seed: int = 0,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Take every measure of every model; returns the rows, which are also appended to `out/results.jsonl`.

    `models` are folders by name, `data` the settings of every data set. What stands there already for the same weights,
    task version and settings is not measured again. Models are compared in pairs on the same items.

    Raises ScoresFailed, when all else is done, where a measure of a model could not be taken; `done`: the other rows.
    """
    from graft.evaluate.work import evaluate as work

    return work(models, measures, data=data, root=root, out=out, seed=seed, device=device)
