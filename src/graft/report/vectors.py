"""What the models of each merge learned away from their base: measured when a report is written, and only once.

Merges of the same models share what was measured. It lies in the run's cache under the hashes of the weights that it
was measured of, so that a report that is written again reads no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from graft.disk import atomic_write
from graft.errors import GraftError, RequestError
from graft.lineage import known_hash
from graft.report.read import Model, Run
from graft.report.series import cosines, plot

if TYPE_CHECKING:
    from graft.deltas import Deltas

VERSION = 1
"""Counted up when the same weights give other numbers."""
SAMPLE = 1 << 16
"""Values of each tensor that are looked at, at most: a model of a billion parameters takes seconds."""
KINDS = ("attention", "feed-forward", "norms", "other")


@dataclass(frozen=True)
class Vectors:
    """The task vectors that some merges are made of: pictures with their titles, or why there are none."""

    merges: tuple[str, ...]
    models: tuple[str, ...]
    base: str
    why: str
    """Why they are measured from this base, in words."""
    found: Deltas | None = None
    problem: str = ""

    @property
    def words(self) -> str:
        """The whole in a sentence or two; empty where there is nothing."""
        return said(self.found) if self.found is not None else ""

    @property
    def pictures(self) -> Sequence[tuple[str, Markup]]:
        """(title, picture) of each."""
        return list(pictures(self.found)) if self.found is not None else []

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        told = {"merges": list(self.merges), "models": list(self.models), "base": self.base, "why": self.why}
        return {**told, "deltas": self.found.plain() if self.found is not None else None, "problem": self.problem}


def vectors(run: Run) -> list[Vectors]:
    """Of every merge that was made of models that lie here; nothing where the recipe says `report: {deltas: false}`."""
    if run.asked.get("deltas") is False:
        return []
    shared: dict[tuple[frozenset[str], str], tuple[list[str], list[str], str]] = {}
    for model in run.models.values():
        if model.verb != "merge" or not model.made or (found := _base(run, model)) is None:
            continue
        base, why = found
        models = [name for name in model.combined if name != base]
        if models:
            shared.setdefault((frozenset(models), base), ([], models, why))[0].append(model.name)
    return [_vectors(run, merges, models, base, why) for (_, base), (merges, models, why) in shared.items()]


def _base(run: Run, merge: Model) -> tuple[str, str] | None:
    """(what the models of a merge are measured from, why that); None where there is nothing to compare."""
    names = merge.combined
    if merge.measured_from is not None:
        return merge.measured_from, "their base in the merge"
    if not names:
        return None
    common = _common(run, names)
    if common is not None and (common not in names or len(names) > 1):
        return common, "the model that all of them come from"
    for other in run.models.values():
        if other.verb == "merge" and other.measured_from is not None and set(names) <= set(other.combined):
            return other.measured_from, f"their base in {other.name}"
    return names[0], "the first of them, as no base is known"


def _common(run: Run, names: Sequence[str]) -> str | None:
    """The youngest model that all of these come from in a line of single parents, or are."""
    lines = [list(_line(run, name)) for name in names]
    return next((name for name in lines[0] if all(name in line for line in lines)), None)


def _line(run: Run, name: str) -> Iterator[str]:
    """A model, what it was made from, and so on, as far as each was made from one."""
    seen: set[str] = set()
    while name in run.models and name not in seen:
        seen.add(name)
        yield name
        parents = run.models[name].parents
        if len(parents) != 1:
            return
        (name,) = parents


def _vectors(run: Run, merges: Sequence[str], models: Sequence[str], base: str, why: str) -> Vectors:
    try:
        found = _kept(run, models, base)
    except (GraftError, OSError) as error:
        return Vectors(tuple(merges), tuple(models), base, why, problem=str(error))
    return Vectors(tuple(merges), tuple(models), base, why, found)


def _kept(run: Run, models: Sequence[str], base: str) -> Deltas:
    """What was measured of these weights before, or is now. Raises GraftError where it cannot be measured."""
    places = [_folder(run, name) for name in (base, *models)]
    made_of = json.dumps([VERSION, SAMPLE, [known_hash(place) for place in places]])
    kept = run.folder / "cache" / "deltas" / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.json"
    from graft.deltas import Deltas, deltas

    if kept.is_file():
        return Deltas.from_plain(json.loads(kept.read_text()), base, models)
    found = deltas(places[0], dict(zip(models, places[1:], strict=True)), sample=SAMPLE)
    kept.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(kept, json.dumps(found.plain()))
    return Deltas.from_plain(found.plain(), base, models)


def _folder(run: Run, name: str) -> Path:
    model = run.models.get(name)
    folder = model.folder if model is not None else None
    if folder is None or not any(folder.glob("*.safetensors")):
        raise RequestError(f"{name}: expected a folder with weights, found none")
    return folder


def said(found: Deltas) -> str:
    """The whole of the task vectors in a sentence or two."""
    each = zip(found.models, found.whole.relative, strict=True)
    words = "‖δ‖/‖θ₀‖: " + ", ".join(f"{name} {relative:.3g}" for name, relative in each) + "."
    if found.whole.conflicts is not None:
        words += (
            f" Signs contradict in {found.whole.conflicts:.0%} of the elements that two models or more changed "
            f"(independent changes of all: {found.by_chance:.0%})."
        )
    if "sample" in found.notes:
        words += f" By at most {found.notes['sample']} values of each tensor."
    return words


def pictures(found: Deltas) -> Iterator[tuple[str, Markup]]:
    """(title, picture): lengths by layer for each kind of tensors, contradicting signs by layer, cosines."""
    kinds = [kind for kind in KINDS if any(_by_layer(found, kind).values())]
    for kind in kinds:
        words = f"Length by layer, {kind} (‖δ‖/‖θ₀‖)"
        yield words, plot(_by_layer(found, kind), words)
    conflicts = {kind: _conflicts(found, kind) for kind in kinds}
    if any(conflicts.values()):
        words = "Share of contradicting signs by layer"
        yield words, plot(conflicts, words)
    if len(found.models) > 1:
        words = "Cosines between the task vectors"
        yield words, cosines(found.models, found.whole.cosines, words)


def _by_layer(found: Deltas, kind: str) -> dict[str, list[tuple[float, float]]]:
    parts = [(part.layer, part.relative) for part in found.parts if part.kind == kind and part.layer is not None]
    return {name: [(float(layer), each[i]) for layer, each in parts] for i, name in enumerate(found.models)}


def _conflicts(found: Deltas, kind: str) -> list[tuple[float, float]]:
    parts = [part for part in found.parts if part.kind == kind]
    return [(float(p.layer), p.conflicts) for p in parts if p.layer is not None and p.conflicts is not None]
