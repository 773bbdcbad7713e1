"""Tuning: a model trained further, on any data format. One file a method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from graft.adapters.facts import adapted_facts, adapter_names, folded_facts, is_adapted, points_of
from graft.adapters.foreign_tasks import is_tasked, names_of, with_tasks
from graft.adapters.point import JOINING, Point
from graft.adapters.table import LEGEND
from graft.errors import CannotCombine, Problem, RequestError, SettingsError, UnknownName
from graft.methods import method, method_names
from graft.settings import Settings, parse
from graft.train.memory import Dimensions
from graft.train.parallel import Parallel
from graft.train.parallel import problems as unspreadable
from graft.tune.experts import experts_of, point_of
from graft.tune.experts import problems as unmixable
from graft.tune.experts import tried as tried_mixture
from graft.tune.settings import TuneSettings, longest, stretched
from graft.tune.tasks import unfit
from graft.verb import Estimate, Facts, Job, Verb

ROOMS = ("experts", "settings", "several", "tasks", "work")


class Tune(Verb[TuneSettings]):
    """Trains a model further."""

    name = "tune"
    summary = "Train a model further on a data set."
    reads = Verb.reads | {"quantised"}
    together = True
    weighed = True
    options_in = "method"
    legend = LEGEND

    def types(self) -> Mapping[str, type[Settings]]:
        return {
            "tune": TuneSettings,
            **{name: method("graft.tune", name).Settings for name in method_names("graft.tune")},
        }

    def methods(self, settings: Mapping[str, Any]) -> list[dict[str, str]]:
        """The design space (He et al. 2022, table 1) as the code has it; `from`: a model to count parameters in."""
        from graft.adapters.table import rows

        known = {key: value for key, value in settings.items() if key == "from"}
        if known != dict(settings):
            others = ", ".join(set(settings) - set(known))
            raise RequestError(f"expected `from` (--from) beside --methods, found {others}")
        model = None
        if known:
            from graft.adapters.trial import skeleton
            from graft.folders import read_config

            model = skeleton(read_config(Path(known["from"])))
        return rows(named_points(), model)

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> TuneSettings:
        settings = parse(TuneSettings, raw, path)
        if len(settings.method) != 1:
            found = ", ".join(settings.method) or "none"
            raise SettingsError([Problem((*path, "method"), f"expected one method, found {found}")])
        ((name, options),) = settings.method.items()
        resolved = parse(method("graft.tune", name).Settings, options or {}, (*path, "method", name)).plain()
        if name == "peft" and settings.tasks and is_tasked(resolved["config"]):
            try:
                resolved["config"] = with_tasks(resolved["config"], list(settings.tasks))
            except RequestError as error:
                raise SettingsError([Problem((*path, "method", name), str(error))]) from None
        if settings.fold and name == "full":
            raise SettingsError([Problem((*path, "fold"), "expected an adapter to fold, found the method full")])
        return settings.model_copy(update={"method": {name: resolved}})

    def check(self, settings: TuneSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.data.objectives import objective_for

        start = models[settings.from_]
        if wrong := settings.misnamed(start.architecture):
            return wrong
        if not start.mergeable and not is_adapted(start):
            return [f"{settings.from_} has no weights of its own to tune: tune its members, or distil it"]
        if is_adapted(start) and "full" in settings.method:
            return [
                f"{settings.from_} is an adapter on a frozen model: full tuning needs whole weights, so give it "
                "`fold: true`, or add an adapter to it (lora, …), or train on the one it has (`method: further`)"
            ]
        if start.stored == "quantised" and ("full" in settings.method or settings.fold):
            wish = "folding into packed weights" if settings.fold else "full tuning"
            return [
                f"{settings.from_} is quantised, and {wish} needs plain ones: train an adapter and leave it apart "
                f"(`fold: false`), or unpack it first ({{quantize: {{from: {settings.from_}, bits: 16}}}})"
            ]
        needing = next((name for name in ("further", *JOINING) if name in settings.method), None)
        if needing and not is_adapted(start):
            return [f"{settings.from_} has no adapters for the method {needing}: name a model that has, or choose lora"]
        try:
            objective_for(start.architecture, settings.objective, start.config)
        except CannotCombine as error:
            return [str(error)]
        if (settings.compile or settings.fold) and _mixes(settings, start):
            return [
                "a mixture of experts has scalings that differ between tokens and reads each text twice: it does not "
                "fold, and `compile` does not follow it; leave both out"
            ]
        if experts_of(settings) and (wrong := unmixable(settings, models)):
            return wrong
        return _too_long(settings, start) or self._spread(settings, start) or self._fits(settings, start)

    @staticmethod
    def _spread(settings: TuneSettings, start: Facts) -> list[str]:
        """What speaks against spreading the training over processes as the settings wish."""
        parallel = settings.parallel
        if parallel is None or parallel.method == "ddp":
            return []
        adapter, quantised = "full" not in settings.method, start.stored == "quantised"
        config = settings.method.get("peft", {}).get("config", {})
        from graft.adapters.foreign import RANKED

        if str(config.get("peft_type")).upper() == RANKED:
            return [
                "AdaLoRA reads whole gradients between steps, which `fsdp` and `zero` spread: use `parallel: ddp`, or "
                "the method lora"
            ]
        by_zero = _not_by_zero(settings, parallel, start) if parallel.method == "zero" else []
        more = unspreadable(parallel, start.config, adapter=adapter, quantised=quantised)
        return [*by_zero, *more][:1]

    def _fits(self, settings: TuneSettings, start: Facts) -> list[str]:
        """What is wrong with the adapter for this model, tried on its skeleton where its configuration is known."""
        ((name, options),) = settings.method.items()
        chosen = method("graft.tune", name)
        if not start.config.get("architectures"):
            return []
        from graft.adapters.trial import parameter_names, problems

        if name == "full" and (options["freeze"] or options["only"]):
            return chosen.problems(parameter_names(start.config), options["freeze"], options["only"])
        if name == "peft":
            from graft.adapters.foreign import tried

            if settings.tasks and is_tasked(options["config"]) and settings.compile and settings.gradient_checkpointing:
                return [
                    "expected `compile` or `gradient_checkpointing` where POLY mixes by `tasks`, found both: compiled "
                    "layers that are computed again are not told the task of their rows"
                ]
            return [] if is_adapted(start) or experts_of(settings) else tried(start.config, options["config"])[0]
        if wrong := _not_among(start, options.get("adapters", []) if name in ("further", *JOINING) else []):
            return wrong
        if name == "fusion":
            from graft.adapters.trial import unfusable

            return unfusable(start, options["adapters"])
        if name in JOINING or not hasattr(chosen, "points"):
            return []
        return problems(
            start.config, chosen.points(chosen.Settings(**options)), fold=settings.fold, compiled=settings.compile
        )

    def _trained(self, settings: TuneSettings, start: Facts) -> int | None:
        """Numbers that an adapter trains; None where all weights are, or where it cannot be told yet."""
        if not start.config.get("architectures"):
            return None
        said = json.dumps(settings.method, sort_keys=True), json.dumps(dict(start.config), sort_keys=True, default=str)
        return counted(*said)

    def check_data(self, settings: TuneSettings, models: Mapping[str, Facts], formats: Mapping[str, str]) -> list[str]:
        from graft.data import split_ref
        from graft.data.objectives import objective_for, unspeakable

        found = [unfit(name, task, formats.get(split_ref(task.data)[0])) for name, task in settings.tasks.items()]
        if settings.data is None:
            return [message for message in found if message]
        start = models[settings.from_]
        objective = objective_for(start.architecture, settings.objective, start.config)
        return unspeakable(objective, settings.from_, start.tokenizer, formats.get(split_ref(settings.data)[0]))

    def facts(self, settings: TuneSettings, models: Mapping[str, Facts], key: str) -> Facts:
        from graft.data.objectives import objective_for, told_of

        start = models[settings.from_]
        heads = {name: task.head for name, task in settings.tasks.items() if task.head != "text"}
        if settings.data is not None or len(heads) < len(settings.tasks):
            objective = objective_for(start.architecture, settings.objective, start.config)
            start = replace(start, config=told_of(start.config, objective))
        if "full" in settings.method:
            return replace(start, heads=heads, folder="")
        if settings.fold:
            return replace(folded_facts(start), heads=heads)
        (chosen,) = settings.method.items()
        mixes = bool(experts_of(settings))
        points = [point.plain() for point in ([point_of(settings)] if mixes else _chosen_points(chosen))]
        config = chosen[1].get("config", {})
        tasks = names_of(config, settings.tasks) if is_tasked(config) else []
        found = adapted_facts(start, points, peft=chosen[0] == "peft" and not mixes, tasks=tasks)
        return replace(found, heads=heads, frozen=start.frozen or start.folder or settings.from_)

    def estimate(self, settings: TuneSettings, models: Mapping[str, Facts]) -> Estimate:
        from graft.train.estimate import training_estimate

        start = models[settings.from_]
        length, known = settings.length or longest(start.config), Dimensions.of(start.config)
        mixed = tried_mixture(settings, models) if experts_of(settings) else None
        trained = mixed.trained if mixed else self._trained(settings, start)
        frozen = start.bytes / start.parameters if start.stored == "quantised" and start.parameters else 4.0
        (chosen,) = settings.method.items()
        reads = None if known is None or trained is None else kept_by(_chosen_points(chosen), known)
        cost = training_estimate(start.parameters, settings, length, known, trained, frozen_bytes=frozen, reads=reads)
        if far := stretched(start.config, settings.length, settings.from_):
            cost = replace(cost, note=f"{cost.note}; {far}")
        if trained is None or settings.fold:
            return cost
        if mixed is not None and mixed.written is not None:  # the experts are written too, and each text is read twice
            seconds = None if cost.seconds is None else cost.seconds * 4 / 3
            parameters = start.parameters + mixed.written
            return replace(cost, parameters=parameters, disk_bytes=4 * mixed.written, seconds=seconds)
        # an adapter that lies apart is all that is written
        return replace(cost, parameters=start.parameters + trained, disk_bytes=4 * trained)

    def preparation(
        self, settings: TuneSettings, models: Mapping[str, Facts], text: Mapping[str, float]
    ) -> Mapping[str, float]:
        from graft.train.estimate import tokenising

        return tokenising(text, models[settings.from_].vocabulary)

    def run(self, job: Job) -> dict[str, Any]:
        from graft.tune.work import run

        return run(job)


def _not_among(start: Facts, names: Sequence[str]) -> list[str]:
    """Which adapters a finished model does not have."""
    there = adapter_names(start)
    return [str(UnknownName("adapter", name, there)) for name in names if there is not None and name not in there][:1]


def _too_long(settings: TuneSettings, start: Facts) -> list[str]:
    """What is wrong with a length for which the model has no positions beside those that the method takes; those that
    are computed reach any length that is said."""
    if not start.config.get("architectures"):
        return []
    from graft.adapters.positions import taken_by
    from graft.adapters.trial import learned_positions

    taken, reach = taken_by(_chosen_points(*settings.method.items())), longest(start.config)
    if (settings.length or 1) + taken <= reach:
        return []
    most = learned_positions(start.config)
    if settings.length is None:
        return [f"expected fewer than {reach} learned positions, which is all {settings.from_} names, found {taken}"]
    if most is None or settings.length + taken <= most:
        return []
    beside = f" beside the {taken} that its method takes" if taken else ""
    return [
        f"expected a `length` of at most {max(1, most - taken)}, for which {settings.from_} has positions{beside}, "
        f"found {settings.length}"
    ]


def _not_by_zero(settings: TuneSettings, parallel: Parallel, start: Facts) -> list[str]:
    """What DeepSpeed cannot train."""
    there = [parse(Point, point) for point in points_of(start)]
    fresh = _chosen_points(*settings.method.items())
    trained, running = there if "further" in settings.method else fresh, [*there, *fresh]
    found = []
    if len(settings.tasks) > 1 and any(task.head != "text" for task in settings.tasks.values()):
        found.append(
            "heads that a step does not reach stay as they are, but DeepSpeed would move them on by their momentum: "
            "use `parallel: fsdp`, or give all tasks `head: text`"
        )
    if any(point.composition == "gated" or point.scale == "learned" for point in trained):
        found.append("DeepSpeed cannot spread single numbers, such as a learned gate or scale: use `parallel: fsdp`")
    if _mixes(settings, start) and parallel.spread == 3:
        found.append(
            "experts are read by the layers that they stand beside, not by themselves, as DeepSpeed would put their "
            "weights together in stage 3: use `parallel: fsdp`, or stage 1 or 2"
        )
    if any(point.form == "tokens" for point in running) and parallel.spread == 3:
        found.append(
            "learned tokens are read before DeepSpeed puts the weights together that it spreads in stage 3: use "
            "`parallel: fsdp`, or stage 1 or 2"
        )
    if any(point.names_experts for point in running) and parallel.spread == 3:
        found.append(
            "adapters on fused experts look these up before DeepSpeed puts them together that it spreads in stage 3: "
            "use `parallel: fsdp`, or stage 1 or 2"
        )
    return found


def _mixes(settings: TuneSettings, start: Facts) -> bool:
    """Whether a mixture of experts is trained, or runs below what is."""
    there = any(point.get("form") == "mixture" for point in points_of(start))
    return there or "mixture" in settings.method or bool(experts_of(settings))


def _chosen_points(chosen: tuple[str, dict[str, Any]]) -> list[Point]:
    """The points of a method with its options; none for methods that are no points."""
    name, options = chosen
    module = method("graft.tune", name)
    return list(module.points(module.Settings(**options))) if hasattr(module, "points") else []


def kept_by(points: Sequence[Point], known: Dimensions) -> float | None:
    """Numbers a token that adapters keep for backward in a layer; None where they keep what linear layers read.

    A bottleneck keeps what it reads; learned keys keep keys and values once more, what attention over them gives, and
    how that differs; factors keep what they multiply.
    """
    each = {
        "bottleneck": known.width,
        "softmax": 2 * known.width + 2 * known.keys,
        "tokens": 2 * known.width + 2 * known.keys,
        "scale": (2 * known.keys + known.hidden) / 3,
        "bias": 0,
    }
    if not points or any(point.form not in each for point in points):
        return None
    return float(sum(each[point.form] * len(point.on) for point in points))


@lru_cache(maxsize=256)
def counted(said: str, configuration: str) -> int | None:
    """Numbers that a method (as JSON, as settings have it) trains in the model of a configuration (as JSON).

    None for methods that are no adapters, and where it cannot be tried. A plan asks it of the same again and again.
    """
    ((name, options),) = json.loads(said).items()
    chosen, config = method("graft.tune", name), json.loads(configuration)
    if name == "peft":
        from graft.adapters.foreign import tried

        return tried(config, options["config"])[1]
    from graft.adapters.trial import trained, trained_on_top

    if name in ("further", *JOINING):
        points = chosen.points(chosen.Settings(**options)) if name in JOINING else None
        return trained_on_top(config, points, options["adapters"])
    if not hasattr(chosen, "points"):
        return None
    return trained(config, chosen.points(chosen.Settings(**options)))


def named_points() -> dict[str, list[Point]]:
    """The points of every method that is one by name, with its own settings."""
    found = {}
    for name in method_names("graft.tune"):
        module = method("graft.tune", name)
        if (
            name not in JOINING
            and hasattr(module, "points")
            and not any(f.is_required() for f in module.Settings.model_fields.values())
        ):
            found[name] = module.points(module.Settings())
    return found


VERB = Tune()
__all__ = ["VERB", "TuneSettings"]
