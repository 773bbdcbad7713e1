"""Putting finished adapters together on the model they were made for: a model too, or folded into an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapt.settings import AdaptSettings
from graft.adapters.facts import active_points, adapted_facts, adapter_names, folded_facts, is_adapted, tasks_in
from graft.adapters.point import Point
from graft.errors import RequestError, UnknownName
from graft.folders import ADAPTED
from graft.lora import CONFIG, named_base
from graft.settings import Settings, parse
from graft.train.memory import PROCESS
from graft.verb import Estimate, Facts, Job, Verb


def _alone(settings: AdaptSettings, models: Mapping[str, Facts]) -> list[str]:
    """What is asked of adapters of peft's own types that only graft's can do."""
    foreign = [name for name in settings.names if is_adapted(models[name]) and "peft" in models[name].config[ADAPTED]]
    together = len(settings.names) > 1 or settings.how == "average" or settings.without
    if not foreign or (not together and settings.weights[foreign[0]] == 1):
        return []
    return [
        f"{foreign[0]} is an adapter of one of peft's own types, which stands alone and whole: fold it "
        f"({{adapt: {{adapters: [{foreign[0]}], fold: true}}}}) and tune the others on that, or use an ensemble"
    ]


def _unlike(settings: AdaptSettings, models: Mapping[str, Facts]) -> list[str]:
    """Which adapters stand on another model than the first, as far as the models or their hashes tell."""
    first = models[settings.start]
    return [
        f"{name} and {settings.start} were made for different models: adapters go together on one"
        for name in settings.names[1:]
        if models[name].initialisation != first.initialisation
        or models[name].stored != first.stored
        or (_base_hash(models[name]) or _base_hash(first)) != (_base_hash(first) or _base_hash(models[name]))
    ]


def _unknown_task(settings: AdaptSettings, models: Mapping[str, Facts]) -> list[str]:
    """What is wrong with the task that is asked for."""
    if settings.task is None:
        return []
    known = tasks_in(models[settings.start])
    if known is None:
        return [
            f"{settings.start} has no tasks to choose from: expected an adapter that mixes by tasks for `task`, tuned "
            "by {peft: {peft_type: POLY, …}} on `tasks`"
        ]
    return [] if settings.task in known else [str(UnknownName(f"task of {settings.start}", settings.task, known))]


def _unequal(settings: AdaptSettings, models: Mapping[str, Facts]) -> list[str]:
    """Which adapters have no mean, as far as their points are known."""
    if settings.how != "average" or settings.without:
        return []
    kinds = [
        (name, [parse(Point, raw) for raw in held]) for name in settings.names for held in active_points(models[name])
    ]
    return [
        f"expected adapters of one kind and size to average, found that {name} and {kinds[0][0]} differ: use `how: "
        "stack`, which adds their changes"
        for name, points in kinds[1:]
        if points != kinds[0][1]
    ][:1]


def _unwritable(settings: AdaptSettings, models: Mapping[str, Facts]) -> list[str]:
    """What peft has no folder for, as far as the points are known."""
    if settings.export is None or settings.without:
        return []
    each = [points for name in settings.names for points in active_points(models[name])]
    if len(each) > 1 and settings.how == "stack":
        return [f"expected one adapter to export, since a peft folder holds one, found {len(each)}: export each alone"]
    points = [parse(Point, raw) for held in each[:1] for raw in held]
    return [
        f"expected LoRA, (IA)³, or on a decoder prefix or prompt tuning with `gate: false` to export, which peft has, "
        f"found {point.form} {point.insertion} on {', '.join(point.on)}: keep graft's own folder, or fold it"
        for point in points
        if point.form not in ("linear", "scale", "softmax", "tokens", "mixture") or _gated(point)
    ][:1]


def _gated(point: Point) -> bool:
    return point.gate and point.form in ("softmax", "tokens")


def _not_there(settings: AdaptSettings, models: Mapping[str, Facts]) -> list[str]:
    """Names to leave out that the models do not have, where all of them are finished."""
    each = [adapter_names(models[name]) for name in settings.names]
    if None in each:
        return []
    there = list(dict.fromkeys(name for names in each for name in names or []))
    return [str(UnknownName("adapter", name, there)) for name in settings.without if name not in there][:1]


def _base_hash(model: Facts) -> str:
    """The hash of the frozen model that finished adapters name; empty of those that are not made yet."""
    return str(model.config.get(ADAPTED, {}).get("base", {}).get("hash", ""))


class Adapt(Verb[AdaptSettings]):
    """Combines adapters."""

    name = "adapt"
    summary = "Put finished adapters together on their model: stacked, averaged, brought in from peft, folded."
    version = 2
    reads = Verb.reads | {"quantised"}

    def types(self) -> Mapping[str, type[Settings]]:
        return {"adapt": AdaptSettings}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> AdaptSettings:
        return parse(AdaptSettings, raw, path)

    def alone(self, raw: Any, root: Path) -> Any:
        """Without `from`, the model that the peft folder names, where that lies on this machine."""
        if not isinstance(raw, Mapping) or not raw.get("peft") or raw.get("from"):
            return raw
        folder = root / Path(str(raw["peft"])).expanduser()
        if not (folder / CONFIG).is_file():
            raise RequestError(f"expected a peft folder (with {CONFIG}) at {folder}, found none")
        named, place = named_base(folder)
        if place is None:
            said = f"names {named}, which is no model's folder here" if named else "names none"
            raise RequestError(
                f"expected the model that {folder} was made for as `from` (--from), found none: its {CONFIG} {said}"
            )
        return {**raw, "from": str(place)}

    def located(self, settings: AdaptSettings, root: Path) -> AdaptSettings:
        if settings.peft is None:
            return settings
        folder = (root / Path(settings.peft).expanduser()).resolve()
        if not (folder / "adapter_config.json").is_file():
            raise RequestError(f"expected a peft folder (with adapter_config.json) at {folder}, found none")
        return settings.model_copy(update={"peft": str(folder)})

    def content(self, settings: AdaptSettings) -> Any:
        from graft.hashing import hash_file

        if settings.peft is None:
            return settings.plain()
        folder = Path(settings.peft)
        read: dict[str, Any] = {path.name: hash_file(path) for path in sorted(folder.glob("adapter_*"))}
        if '"XLORA"' in (folder / CONFIG).read_text():
            from graft.adapters.peft_mixture import experts_of

            each = [sorted(place.glob("adapter_*")) for place in experts_of(folder)]
            read["experts"] = [{path.name: hash_file(path) for path in paths} for paths in each]
        return {**settings.plain(), "peft": read}

    def check(self, settings: AdaptSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.adapters.trial import unfoldable_in

        if plain := [name for name in settings.names if not is_adapted(models[name])]:
            return [
                f"{name} is no adapter on a frozen model (adapters that were folded are part of its weights): name "
                "nodes tuned with lora, houlsby, … and without `fold`"
                for name in plain
            ]
        if settings.from_ is not None and is_adapted(models[settings.from_]):
            return [f"{settings.from_} has adapters of its own: expected the frozen model that peft's was made for"]
        if settings.peft is not None:
            from graft.adapters.peft_trial import unreadable

            return unreadable(Path(settings.peft), models[settings.start])
        found = _unlike(settings, models) + _alone(settings, models)
        found += _unequal(settings, models) + _not_there(settings, models) + _unwritable(settings, models)
        if settings.fold and models[settings.start].stored == "quantised":
            found.append(
                f"{settings.start} stands on a quantised model, into which nothing folds: leave the adapters apart "
                f"(`fold: false`), or let its weights be unpacked ({{quantize: {{from: {settings.start}, bits: 16}}}}, "
                "which folds its adapters into them)"
            )
        elif settings.fold:
            found += [
                f"{name}: {wrong}" for name in settings.names for wrong in unfoldable_in(models[name], settings.without)
            ]
        return found + _unknown_task(settings, models)

    def facts(self, settings: AdaptSettings, models: Mapping[str, Facts], key: str) -> Facts:
        first = models[settings.start]
        made = folded_facts(first) if settings.fold else adapted_facts(first)
        for name in settings.names[1:] if settings.how == "stack" and not settings.fold else []:
            for points in active_points(models[name], settings.without):
                made = adapted_facts(made, points)
        return replace(made, trained_on=frozenset().union(*(facts.trained_on for facts in models.values())))

    def estimate(self, settings: AdaptSettings, models: Mapping[str, Facts]) -> Estimate:
        start = models[settings.start]
        size = 4 * start.parameters
        return Estimate(start.parameters, size if settings.fold else size // 100, PROCESS + size, 1.0, "no training")

    def run(self, job: Job) -> dict[str, Any]:
        from graft.adapt.work import run

        return run(job)


VERB = Adapt()
__all__ = ["VERB", "AdaptSettings"]
