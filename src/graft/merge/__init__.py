"""Merging: one model out of the weights of several. One file a method."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from graft.errors import CannotCombine, GraftError, Problem, RequestError, SettingsError, closest
from graft.evaluate.settings import DRAWN
from graft.merge._options import OnData, SubspaceSettings
from graft.merge.inputs import settled
from graft.merge.judged import judged_parts, located, task_content
from graft.merge.settings import DeltaSettings, MergeSettings
from graft.merge.slices import COUNTS, length, restacked
from graft.merge.varying import parse_varying
from graft.methods import method, methods
from graft.settings import Settings
from graft.verb import Estimate, Facts, Job, Verb

ROOMS = (
    "architecture",
    "adapted",
    "barrier",
    "candidates",
    "engine",
    "inputs",
    "journal",
    "judged",
    "matching",
    "naming",
    "part",
    "preflight",
    "prepared",
    "related",
    "search",
    "seeds",
    "settings",
    "slices",
    "space",
    "stream",
    "symmetry",
    "table",
    "telling",
    "varying",
    "vocabulary",
)


class Merge(Verb[MergeSettings]):
    """Combines weights into one model of the same size."""

    name = "merge"
    on_disk = False
    loads = False
    version = 2
    summary = "Combine the weights of several models of one initialisation into one model."

    def types(self) -> Mapping[str, type[Settings]]:
        return {name: module.Settings for name, module in methods("graft.merge").items()}

    def methods(self, settings: Mapping[str, Any]) -> list[dict[str, str]]:
        """Every method with what it does, what it needs and its options. Raises RequestError for anything beside."""
        from graft.merge.table import rows

        if settings:
            raise RequestError(f"expected nothing beside --methods, found {', '.join(settings)}")
        return rows({name: module.Settings for name, module in methods("graft.merge").items()})

    def types_of(self, raw: Mapping[str, Any]) -> Mapping[str, type[Settings]]:
        name = str(raw.get("method", "linear"))
        return {name: method("graft.merge", name).Settings}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> MergeSettings:
        name = raw.get("method", "linear") if isinstance(raw, dict) else "linear"
        if not isinstance(name, str):
            raise SettingsError([Problem((*path, "method"), f"expected the name of a method, found {name!r}")])
        own = method("graft.merge", name).Settings
        try:
            return parse_varying(own, raw, path)
        except SettingsError as error:
            raise SettingsError([self._whose(problem, name, own, path) for problem in error.problems]) from None

    def _whose(self, problem: Problem, name: str, own: type[Settings], path: tuple[str | int, ...]) -> Problem:
        """An option that other methods have is said to be theirs."""
        key, *rest = (*problem.path[len(path) :], "")
        if rest != [""] or key in own.model_fields:
            return problem
        takers = [other for other, each in self.types().items() if key in each.model_fields]
        if not takers:
            theirs = {option for each in self.types().values() for option in each.model_fields}
            close = closest(str(key), sorted(theirs - set(own.model_fields)))
            known = close is None or closest(str(key), list(own.model_fields)) is not None
            return problem if known else replace(problem, message=f"{problem.message}; other methods take `{close}`")
        listed = ", ".join(takers[:8]) + (f" and {len(takers) - 8} more" if len(takers) > 8 else "")
        return replace(problem, message=f"{name} takes no `{key}`; {listed} do: name one as `method`")

    def located(self, settings: MergeSettings, root: Path) -> MergeSettings:
        found = {key: located(part, root) for key, part in judged_parts(settings).items() if part.task is not None}
        own = found.pop("", None)
        update = {**found, **({"task": own.task} if own is not None else {})}
        return settings.model_copy(update=update) if update else settings

    def content(self, settings: MergeSettings) -> Any:
        plain = settings.plain()
        for key, part in judged_parts(settings).items():
            whole = plain[key] if key else plain
            # how many are judged at a time changes nothing; what stands in a task's file and which items are drawn does
            whole.pop("jobs", None)
            whole["task"] = part.task and task_content(Path(part.task))
            whole |= {"drawn": DRAWN} if part.judges else {}
        return plain

    def unreadable(self, models: Mapping[str, Facts]) -> list[str]:
        """Nothing: what a merge reads depends on its settings."""
        return []

    def check(self, settings: MergeSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.merge.inputs import misplaced
        from graft.merge.preflight import anyway, problems

        never, may_be_forced = problems(settings, models)
        first, lying = models[settings.parents[0]].architecture, settled(settings, models)
        beside = settings.search or settings.seeds or settings.barrier
        if beside and hasattr(method("graft.merge", settings.method), "make"):
            never.append(f"{settings.method} makes no model: leave `search`, `seeds` and `barrier` out")
        if settings.barrier is not None:
            never += [
                f"{name} is stored as {lying[name].stored}: a `barrier` is measured between models of safetensors"
                for name in settings.names
                if lying[name].stored != "safetensors"
            ]
        for judged in judged_parts(settings).values():
            if judged.judges and first not in (kinds := judged.entry().architectures):
                name = judged.task or judged.measure
                never.append(f"{name} is taken of {' or '.join(kinds)} models, found {first}: name another measure")
        never += [] if never else misplaced(settings, models)
        if not (never or settings.anyway):
            from graft.merge.related import strangers

            may_be_forced += strangers(settings, models)
        return [*never, *anyway(settings, may_be_forced)]

    def facts(self, settings: MergeSettings, models: Mapping[str, Facts], key: str) -> Facts:
        from graft.data.objectives import PREFIX_LM, is_prefix_lm

        models = settled(settings, models)
        first = models[settings.parents[0]]
        config, share = _stacked(settings, models) if settings.slices else (first.config, 1.0)
        if not all(is_prefix_lm(models[name].config) for name in settings.parents):
            config = {key: value for key, value in config.items() if key != PREFIX_LM}
        grown = {models[name].initialisation for name in settings.parents}
        spoken = {models[name].vocabulary for name in settings.parents}
        unknown = any(name.startswith("unknown:") for name in grown)
        width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(settings.dtype or "")
        return Facts(
            first.architecture,
            first.initialisation
            if len(grown) == 1 or settings.makes == "adapter"
            else f"unknown:{key}"
            if unknown
            else f"of:{key}",
            first.vocabulary if settings.vocabulary != "union" or len(spoken) == 1 else f"of:{key}",
            round(first.parameters * share),
            round(share * (first.parameters * width if width else first.bytes)),
            config,
            trained_on=frozenset().union(*(models[name].trained_on for name in settings.parents)),
            stored="adapter" if settings.makes == "adapter" else "safetensors",
            tokenizer=first.tokenizer,
            start=first.start if len(grown) == 1 else None,
        )

    def estimate(self, settings: MergeSettings, models: Mapping[str, Facts]) -> Estimate:
        made = self.facts(settings, models, "")
        moved = made.bytes + sum(models[name].bytes for name in settings.parents)
        memory = 330 * 2**20 + 2**24 * len(settings.parents)
        note = "streamed; by bytes moved at 1 GB/s"
        judges = [part for part in judged_parts(settings).values() if part.judges]
        if judges or settings.method == "learned_soup":
            side_by_side = max((getattr(part, "jobs", 1) for part in judges), default=1)
            memory += (
                side_by_side * 2 * max(made.bytes, 4 * made.parameters if settings.method == "learned_soup" else 0)
            )
            note += "; and models are judged in memory before, which takes as long as measuring them"
        beside = 0.0
        if isinstance(settings, OnData | SubspaceSettings):
            held, beside, more = settings.cost(models[settings.parents[0]])
            memory, note = memory + held, f"{note}; {more}" if more else note
        seconds = None if judges else moved / 1e9 + beside
        return Estimate(made.parameters, made.bytes, memory, seconds, note)

    def measured(self, settings: MergeSettings) -> Mapping[str, Any]:
        parts = [part for part in judged_parts(settings).values() if part.judges]
        return {reference: part.entry() for part in parts for reference in part.data}

    def told(self, notes: Mapping[str, Any]) -> list[str]:
        from graft.merge.telling import lines

        return lines(notes)

    def begin(self, settings: MergeSettings, folders: Mapping[str, Path], cache: Path) -> None:
        """Headers are compared; then the architecture is built in another process, and torch imported, while the models
        are hashed. Raises CannotCombine where the headers differ or one folder stands for two models."""
        from graft.merge.architecture import begin
        from graft.merge.inputs import inputs, once
        from graft.merge.preflight import agree

        try:
            once(settings, folders)
            parts = inputs(settings, folders)
            agree(settings, parts)
            begin(parts[settings.parents[0]].home, cache)
        except CannotCombine:
            raise
        except GraftError:
            # what has no headers to compare is told of by the checks
            return
        Thread(target=_import_engine).start()

    def run(self, job: Job) -> dict[str, Any]:
        from graft.merge.engine import run

        found = run(job)
        assert isinstance(job.settings, MergeSettings)
        if job.settings.barrier is not None:
            from graft.merge.barrier import barriers

            found["notes"]["barriers"] = barriers(job)
        return found


def _import_engine() -> None:
    """With torch, whose many objects all stay: to look for garbage among them takes a sixth of the time."""
    gc.disable()
    try:
        import_module("graft.merge.engine")
    finally:
        gc.enable()


def _stacked(settings: MergeSettings, models: Mapping[str, Facts]) -> tuple[Mapping[str, Any], float]:
    """(configuration, size as a share of that of the first model) of a stack of slices."""
    reference = settings.parents[0]
    before = next((n for key, n in models[reference].config.items() if key in COUNTS), None)
    if before is None:
        return models[reference].config, 1.0
    config = restacked({name: facts.config for name, facts in models.items()}, reference, settings.stacked)
    return config, sum(map(length, settings.stacked)) / before


VERB = Merge()
__all__ = ["VERB", "DeltaSettings", "MergeSettings"]
