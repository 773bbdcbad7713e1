"""Which merge to try first, and why: rules of thumb over what the task vectors look like, each with its source.

A suggestion is where to begin, no promise. What decides is held-out data; the ensemble of the same models, which pays
with the sum of their costs, is what a merge is measured against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from graft.adapters.facts import base_there
from graft.deltas.measure import Deltas
from graft.errors import RequestError
from graft.lineage import read_manifest
from graft.lora import base_folder, is_lora
from graft.merge.inputs import is_adapter, readable
from graft.relate import Relation, relate

ALIKE = 0.5
"""Cosine above which task vectors count as runs of one task."""
HARDLY = 0.2
"""Cosine, of either sign, up to which task vectors count as independent."""
TRIMMABLE = 0.9
"""Share of ‖δ‖² in the largest fifth above which a density of 0.2 loses little; of normal numbers that fifth holds
0.65."""
SEARCHED = "search: {over: {scale: [0, 1.5]}, on: …}"
WITH_TEXT = "fisher or regmean (on: …), where there is text of what each model was tuned on"
ENSEMBLE = "an ensemble with `vocabulary: union` (or bytes): graft ensemble OUT MODEL… --vocabulary union"
FAR = 0.5
"""‖δ‖ / ‖θ₀‖ above which a model has left the neighbourhood of its base."""


@dataclass(frozen=True)
class Advice:
    """A method with settings, the reasons in words, and what else to try."""

    method: str
    settings: Mapping[str, Any]
    why: Sequence[str]
    also: Sequence[str] = field(default_factory=list)
    base: str | None = None
    """The folder that task vectors are measured from, where the method has one."""

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def explain(
    models: Sequence[Path], base: Path | None, adapters_of: Path | None = None, allow_pickle: bool = False
) -> Advice:
    """What to try first with these folders. `adapters_of`: the model that adapters among them stand on, where they do
    not name it rightly; pickles are read where `allow_pickle` says so.

    Raises RequestError where there are fewer than two and no base, where one is named twice, and where a pickle is not
    allowed.
    """
    if len({model.resolve() for model in models}) < len(models):
        raise RequestError(f"expected each model once, found {', '.join(map(str, models))}")
    base = base or common_base(models)
    if len(models) + (base is not None) < 2:
        raise RequestError("expected two models, or one and its `base` (--base), found fewer")
    extra = {"base": base, "adapters_of": adapters_of}
    more = {name: folder for name, folder in extra.items() if folder is not None}
    with readable([*models, *more.values()], allow_pickle) as folders:
        at = dict(zip(more, folders[len(models) :], strict=True))
        named = {str(model): folder for model, folder in zip(models, folders, strict=False)}
        return _explained(named, at.get("base"), at.get("adapters_of"))


def _explained(models: Mapping[str, Path], base: Path | None, adapters_of: Path | None) -> Advice:
    from graft.deltas.measure import deltas

    first, *rest = models
    matched: list[str] = []
    for name in rest if base is None else models:
        found = relate(base or models[first], models[name], adapters_of=adapters_of or _lost(models[name], base))
        if found.weights != "yes":
            why = [f"{name}: {found.kind} ({found.evidence})", found.weights_why]
            if found.kind == "same initialisation" and found.weights == "after alignment":
                matched = matched or why
                continue
            aligned = found.kind in ("permuted", "other initialisation") and found.weights == "after alignment"
            return Advice("rebasin" if aligned else "none", {}, why, _instead(found))
    if matched:
        return _by_token(models, base, matched)
    if base is None:
        why = ["the base is not known (name it: `base`, --base): without it there are no task vectors to look at"]
        return Advice("linear", {}, why, ["slerp", "greedy_soup"])
    advice = advise(deltas(base, models, adapters_of=adapters_of))
    return advice if advice.method == "linear" else replace(advice, base=str(base))


def _by_token(models: Mapping[str, Path], base: Path | None, why: Sequence[str]) -> Advice:
    """Relatives whose embeddings have other rows: what they learned cannot be compared, but merged it can be."""
    by_token = {"vocabulary": "union"}
    if len(models) == 1:
        return Advice("task_arithmetic", by_token, why, [SEARCHED, ENSEMBLE], str(base))
    return Advice("linear", by_token, why, ["task_arithmetic or ties, with a base and the same vocabulary", ENSEMBLE])


def _lost(model: Path, base: Path | None) -> Path | None:
    """The base, where the model is an adapter whose own is not on this machine."""
    return base if is_adapter(model) and _below(model) is None else None


def _below(model: Path) -> Path | None:
    """Where the model that an adapter names lies on this machine."""
    return base_folder(model) if is_lora(model) else base_there(model)


def _instead(found: Relation) -> list[str]:
    """What works where weights do not."""
    if found.predictions == "no":
        return []
    if found.predictions == "yes":
        return ["an ensemble: graft ensemble OUT MODEL…"]
    return [ENSEMBLE]


def common_base(models: Sequence[Path]) -> Path | None:
    """The one model that all were made from, by their manifests or as adapters of it, where its folder is there."""
    found = {_made_from(model) for model in models}
    base = found.pop() if len(found) == 1 else None
    return base if base is not None and (base / "config.json").is_file() else None


def _made_from(model: Path) -> Path | None:
    if is_adapter(model):
        below = _below(model)
        return below.resolve() if below is not None else None
    manifest = read_manifest(model)
    parents = manifest.parents if manifest is not None else []
    return (model / parents[0].path).resolve() if len(parents) == 1 else None


def advise(found: Deltas) -> Advice:
    """What to try first with these task vectors."""
    why = _far(found)
    if len(found.models) == 1:
        reason = "one task vector: how far to go along it is the one thing to find (Ilharco et al. 2023)"
        return Advice("task_arithmetic", {"scale": 1.0}, [*why, reason], [SEARCHED])
    pairs = [found.whole.cosines[i][j] or 0.0 for i, j in combinations(range(len(found.models)), 2)]
    mean = sum(pairs) / len(pairs)
    kept = min(found.largest)
    conflicts = found.whole.conflicts or 0.0
    if mean >= ALIKE:
        reason = f"the task vectors point the same way (mean cosine {mean:.2f}): their mean is near all of them"
        return Advice("linear", {}, [*why, f"{reason} (Wortsman et al. 2022)"], ["greedy_soup", "model_stock"])
    apart = _overlap(mean)
    if kept >= TRIMMABLE and conflicts > 0.1:
        reasons = [
            f"the largest fifth of the changes holds {kept:.0%} of each task vector: the rest can be trimmed",
            f"signs contradict in {conflicts:.0%} of the elements that several models changed "
            f"(independent changes: {found.by_chance:.0%}), which an elected sign settles (Yadav et al. 2023)",
        ]
        return Advice("ties", {"density": 0.2, "scale": 1.0}, [*why, *reasons], [SEARCHED, "task_arithmetic"])
    reasons = [
        f"the changes are spread out: the largest fifth holds {kept:.0%} of each task vector (65% if they were normal "
        "noise), so that trimming would lose much",
        "a sum of whole task vectors often goes too far: on held-out data the best scale can be a fraction of 1 "
        "(Ilharco et al. 2023), and the one suggested is the mean's, or 0.3 for many models",
    ]
    also = [SEARCHED, WITH_TEXT, "iso_c", "tsv_merge"]
    return Advice("task_arithmetic", {"scale": _scale(found)}, [*why, apart, *reasons], also)


def _overlap(mean: float) -> str:
    """What the mean cosine of task vectors, below ALIKE, says of their sum."""
    if mean > HARDLY:
        return f"the task vectors go the same way in part (mean cosine {mean:.2f}): a whole sum goes too far along it"
    if mean < -HARDLY:
        return f"the task vectors go against each other (mean cosine {mean:.2f}): added, each takes from the others"
    return f"the task vectors hardly overlap (mean cosine {mean:.2f}): added, each keeps its own"


def _scale(found: Deltas) -> float:
    """Ilharco et al. 2023 found 0.3 to 0.5 to do for sums of many task vectors."""
    return max(round(1.0 / len(found.models), 2), 0.3)


def _far(found: Deltas) -> list[str]:
    """A warning for every model that has gone far."""
    return [
        f"{name} has moved by {moved:.0%} of its base's length: averages of models that far apart often fail; "
        "compare with the ensemble"
        for name, moved in zip(found.models, found.whole.relative, strict=True)
        if moved > FAR
    ]
