"""What a run found: a table for the terminal, a summary for machines, and one self-contained page.

Everything is read from the run's folder (manifests, training logs, `results.jsonl`), so a report can be written again
at any time, for a run that is still going on, and for rows that `graft eval` measured without a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["summary", "table", "write_report"]


def write_report(folder: Path | str) -> Path:
    """Write `report.html` into a run's folder and return its path. Raises RequestError where it is no such folder."""
    from graft.report.page import write_page
    from graft.report.read import read_run

    return write_page(read_run(Path(folder)))


def table(folder: Path | str) -> RenderableType:
    """The run as a rich table: scores ± half of the interval, best in bold, cost, what is worse than a parent."""
    from graft.report.read import read_run
    from graft.report.terminal import render

    return render(read_run(Path(folder)))


def summary(folder: Path | str) -> dict[str, Any]:
    """The run as one JSON-ready value: family, models with scores, verdicts and cost, comparisons, problems; of its
    merges the task vectors, and the measure along the straight lines between their models; of quantised models what
    packing cost, and what tuning won back."""
    from graft.report.hills import hills
    from graft.report.judge import summarise
    from graft.report.quantised import packings
    from graft.report.read import read_run
    from graft.report.vectors import vectors

    run = read_run(Path(folder))
    merged = {"task_vectors": [each.plain() for each in vectors(run)]}
    found = {"barriers": [each.plain() for each in hills(run)], "quantised": [each.plain() for each in packings(run)]}
    return summarise(run) | merged | found
