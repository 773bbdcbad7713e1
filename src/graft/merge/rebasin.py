"""Models of different initialisation: put into one order (Git Re-Basin), then averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.evaluate.settings import DRAWN
from graft.folders import copy_companions
from graft.merge import linear
from graft.merge.judged import Judged

if TYPE_CHECKING:
    from graft.merge.prepared import Prepared
    from graft.merge.stream import Combine, Tensors
    from graft.merge.symmetry import Symmetries
    from graft.verb import Job

AGREEMENT, LINES = "agreement.json", "lines.json"


class Settings(linear.Settings, Judged):
    """The weighted mean after the units of every other model were put into the order in which its weights agree best
    with the first's; with `on`, the loss along the straight line before and after."""

    aligns: ClassVar[bool] = True

    method: Literal["rebasin"] = "rebasin"  # type: ignore[assignment]
    rounds: Annotated[int, Field(ge=1, description="Times that all orders are gone through, at most.")] = 20
    points: Annotated[int, Field(ge=3, description="Models measured on each line, its ends among them.")] = 5

    @model_validator(mode="after")
    def _of_one_vocabulary(self) -> Settings:
        if self.vocabulary is not None:
            raise ValueError(
                "expected no `vocabulary` beside rebasin, which matches units over the rows of one vocabulary: an "
                "ensemble with `vocabulary: union` takes models of several"
            )
        return self


def prepare(job: Job, settings: Settings) -> Prepared:
    """Finds the orders and writes the models in them beside; those are merged.

    Weight matching, Ainsworth et al. 2023, arXiv:2209.04836, algorithm 1. Raises CannotCombine for architectures whose
    order cannot be read, and CheckpointError for NaN and Inf.
    """
    from graft.merge.inputs import inputs
    from graft.merge.prepared import Prepared
    from graft.merge.symmetry import symmetries

    first, *others = settings.names
    known = symmetries(inputs(settings, job.models)[first].home)
    folders, notes = dict(job.models), {}
    for name in others:
        folders[name] = _aligned(known, job, settings, name)
        notes[name] = json.loads((folders[name] / AGREEMENT).read_text())
        if settings.judges:
            notes[name] |= _lines(job, settings, name, folders[name])
    return Prepared(settings, {"alignment": {"to": first, "models": notes}}, models=folders)


def _aligned(known: Symmetries, job: Job, settings: Settings, name: str) -> Path:
    """The folder of a model in the order that agrees with the first, and how well they agree."""
    from graft.merge._kept import kept, made_of
    from graft.merge.inputs import called_alike, inputs
    from graft.merge.matching import Matching, write_aligned
    from graft.merge.symmetry import check_read

    parts = called_alike(inputs(settings, job.models), known.axes)
    first, second = parts[settings.names[0]], parts[name]

    def make(out: Path) -> None:
        with first.open() as a, second.open() as b:
            check_read(known, a.headers, first.folder)
            check_read(known, b.headers, second.folder)
            matching = Matching(known, a, b)
            reached = matching.search(settings.rounds)
            write_aligned(b, known, matching.orders, out)
        # two tensors that an adapter made of one that its base ties
        apart = {"tie_word_embeddings": False} if second.apart else {}
        (out / "config.json").write_text(json.dumps({**second.config, **apart}))
        copy_companions(second.companions, out)
        cosines = {"cosine_before": round(reached[0], 6), "cosine_after": round(reached[-1], 6)}
        (out / AGREEMENT).write_text(json.dumps({**cosines, "rounds": len(reached) - 1}))

    made = made_of(job, settings, [settings.names[0], name], rounds=settings.rounds)
    return kept(job, f"aligned/{settings.names.index(name)}", made, make)


def _lines(job: Job, settings: Settings, name: str, aligned: Path) -> dict[str, Any]:
    """The measure along the straight line from the first model to another, before and after it was aligned."""
    from graft.evaluate.judge import Judge
    from graft.merge._kept import kept, made_of
    from graft.merge.barrier import line_between

    first = settings.names[0]

    def make(folder: Path) -> None:
        judge = Judge.of(settings.entry(), job.data, job.root, settings.metric)
        found: dict[str, Any] = {"metric": judge.metric}
        for when, other in (("before", job.models[name]), ("after", aligned)):
            line = line_between(job.models[first], other, judge, settings.points, job.device)
            found[f"line_{when}"], found[f"barrier_{when}"] = list(line.values), line.barrier
        (folder / LINES).write_text(json.dumps(found))

    measured = {key: settings.plain()[key] for key in ("on", "measure", "task", "metric", "limit")} | {"drawn": DRAWN}
    made = made_of(job, settings, [first, name], rounds=settings.rounds, points=settings.points, **measured)
    return json.loads((kept(job, f"lines/{settings.names.index(name)}", made, make) / LINES).read_text())


def rule(tensors: Tensors, settings: Settings) -> Combine:
    """The weighted mean of the aligned models."""
    return linear.rule(tensors, settings)
