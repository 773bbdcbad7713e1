"""Models of different initialisation: put into one order (Git Re-Basin), then averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from graft.merge import linear
from graft.merge.judged import Judged

if TYPE_CHECKING:
    from graft.merge.prepared import Prepared
    from graft.merge.stream import Combine, Tensors
    from graft.merge.symmetry import Symmetries
    from graft.verb import Job


class Settings(linear.Settings, Judged):
    """The weighted mean after the units of every other model were put into the order in which its weights agree best
    with the first's; with `on`, the loss along the straight line before and after."""

    aligns: ClassVar[bool] = True

    method: Literal["rebasin"] = "rebasin"  # type: ignore[assignment]
    rounds: Annotated[int, Field(ge=1, description="Times that all orders are gone through, at most.")] = 20
    points: Annotated[int, Field(ge=3, description="Models measured on each line, its ends among them.")] = 5


def prepare(job: Job, settings: Settings) -> Prepared:
    """Finds the orders and writes the models in them beside; those are merged.

    Weight matching, Ainsworth et al. 2023, arXiv:2209.04836, algorithm 1. Raises CannotCombine for architectures whose
    order cannot be read.
    """
    from graft.merge.engine import stamps
    from graft.merge.prepared import Prepared
    from graft.merge.symmetry import symmetries

    first, *others = settings.names
    known = symmetries(job.models[first])
    folders, notes = {first: job.models[first]}, {}
    for name in others:
        out = job.scratch / "aligned" / name
        made = json.dumps({"rounds": settings.rounds, "of": stamps({n: job.models[n] for n in (first, name)})})
        folders[name], notes[name] = out, _aligned(known, job.models[first], job.models[name], out, settings, made)
        if settings.judges:
            notes[name] |= _lines(job, settings, job.models[first], job.models[name], out)
    return Prepared(settings, {"alignment": {"to": first, "models": notes}}, models=folders)


def _aligned(known: Symmetries, first: Path, second: Path, out: Path, settings: Settings, made: str) -> dict[str, Any]:
    """Writes `second` in the order that agrees with `first` into `out`, unless it is there; how well they agree."""
    from graft.checkpoint import TensorReader, atomic_write
    from graft.merge.engine import COMPANIONS
    from graft.merge.matching import Matching, write_aligned
    from graft.merge.symmetry import check_read

    mark = out / "aligned.json"
    if mark.is_file() and (found := json.loads(mark.read_text()))["made"] == made:
        return found["agreement"]
    with TensorReader(first) as a, TensorReader(second) as b:
        check_read(known, a.headers, first)
        check_read(known, b.headers, second)
        matching = Matching(known, a, b)
        reached = matching.search(settings.rounds)
        write_aligned(b, known, matching.orders, out)
    for path in second.iterdir():
        if path.name in ("config.json", *COMPANIONS):
            (out / path.name).write_bytes(path.read_bytes())
    agreement = {
        "cosine_before": round(reached[0], 6),
        "cosine_after": round(reached[-1], 6),
        "rounds": len(reached) - 1,
    }
    atomic_write(mark, json.dumps({"made": made, "agreement": agreement}))
    return agreement


def _lines(job: Job, settings: Settings, first: Path, second: Path, aligned: Path) -> dict[str, Any]:
    from graft.evaluate.judge import Judge
    from graft.merge.barrier import line_between

    judge = Judge.of(settings.entry(), job.data, job.root, settings.metric)
    found: dict[str, Any] = {"metric": judge.metric}
    for when, folder in (("before", second), ("after", aligned)):
        line = line_between(first, folder, judge, settings.points, job.device)
        found[f"line_{when}"], found[f"barrier_{when}"] = list(line.values), line.barrier
    return found


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """The weighted mean of the aligned models."""
    return linear.rule(tensors, settings)
