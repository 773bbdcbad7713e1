"""Which nodes fit into a given memory, and what to change in those that do not: the least change first."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from graft import machine
from graft.errors import SettingsError
from graft.plan.steps import Plan, Step
from graft.settings import Bytes, Settings, parse
from graft.train.parallel import Parallel
from graft.train.settings import TrainSettings
from graft.verb import Facts, Verb

CHANGES: dict[str, tuple[Any, ...]] = {
    "accumulate": (2, 4, 8, 16, 32, 64),
    "gradient_checkpointing": (True,),
    "precision": ("bf16",),
    "optimizer": ("adamw_8bit",),
}
"""What may be tried, the kindest first: pieces of a step change nothing but time, checkpointing costs a third more of
it, bf16 and moments of 8 bits change the numbers a little."""

DEVICES = (2, 4, 8, 16, 32, 64)
"""Over so many devices a training may be spread."""


@dataclass(frozen=True)
class Fit:
    """Whether a node fits; if not, the changes with which it would, each with the bytes it then needs."""

    node: str
    memory_bytes: int
    fits: bool
    changes: list[tuple[Mapping[str, Any], int]]

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def memory_limit(words: str) -> int:
    """Bytes in `24GB`. Raises SettingsError for what is no size."""
    return parse(_Limit, {"fit": words}, ()).fit


class _Limit(Settings):
    fit: Annotated[Bytes, Field(gt=0, description="Memory of the machine or device.")]


def launched(plan: Plan, processes: int) -> Plan:
    """The plan as it is where a launcher has so many processes train each model, with the memory of one of them."""
    facts = plan.recipe.facts(lambda name: name)

    def together(step: Step) -> Step:
        settings, spread = step.node.settings, getattr(step.node.settings, "parallel", None) or Parallel()
        if not isinstance(settings, TrainSettings) or processes % spread.tensor:
            return step
        changed = settings.model_copy(update={"parallel": spread.model_copy(update={"devices": processes})})
        cost = step.node.verb.estimate(changed, {model: facts[model] for model in step.node.models})
        return replace(step, node=replace(step.node, settings=changed), estimate=cost)

    return replace(plan, steps={name: together(step) for name, step in plan.steps.items()})


def uneven(plan: Plan) -> str:
    """Which trainings that are to run have rows that their processes cannot share out; empty where all can."""
    settings = {name: step.node.settings for name, step in plan.steps.items() if step.state != "cached"}
    asked = {name: one for name, one in settings.items() if isinstance(one, TrainSettings) and one.parallel}
    wrong = {name: one.uneven(one.parallel.devices or 1) for name, one in asked.items() if one.parallel}
    return "\n".join(f"{name}: {why}" for name, why in wrong.items() if why)


def fits(plan: Plan, limit: int) -> list[Fit]:
    """Every node that is still to be made."""
    facts = plan.recipe.facts(lambda name: name)
    found = []
    for name, step in plan.steps.items():
        if step.state == "cached":
            continue
        needed, node = step.estimate.memory_bytes, step.node
        own = {model: facts[model] for model in node.models}
        asked = (node.verb, node.settings, own, limit)
        alone = [] if needed <= limit else ways(*asked)
        changes = [] if needed <= limit else [*alone, *spread(*asked), *([] if alone else fewer(*asked))]
        found.append(Fit(name, needed, needed <= limit, changes))
    return found


SURE = 1.15
"""Estimates of memory are within 15 % of what was measured (docs/tuning.md): beyond that a training cannot fit."""


def too_large(plan: Plan, device: str | None = None) -> str:
    """Which trainings and packings that are to run need more memory than there is, and what would help; empty where all
    fit."""
    weighed = {name for name, step in plan.steps.items() if step.state != "cached" and step.node.verb.weighed}
    if not weighed:
        return ""
    there = machine.memory(device)
    large = {name for name in weighed if plan.steps[name].estimate.memory_bytes > SURE * there}
    if not large:
        return ""
    wrong = [told(found) for found in fits(plan, there) if found.node in large]
    return f"expected models whose making fits into {machine.size(there)} of memory, found {'; '.join(wrong)}"


def ways(
    verb: Verb[Any], settings: Settings, models: Mapping[str, Facts], limit: int
) -> list[tuple[Mapping[str, Any], int]]:
    """Changes of `settings` with which the verb's work fits into `limit` bytes, the kindest first, with what it needs.

    Of each kind of combination the first that fits; none where nothing does, or where there is no training.
    """
    if not isinstance(settings, TrainSettings):
        return []
    found: dict[tuple[str, ...], tuple[Mapping[str, Any], int]] = {}
    for change in _combinations(settings):
        kind = tuple(change)
        if any(set(known) <= set(kind) for known in found):
            continue
        needed = verb.estimate(settings.model_copy(update=dict(change)), models).memory_bytes
        if needed <= limit:
            found[kind] = change, needed
    return list(found.values())


def spread(
    verb: Verb[Any], settings: Settings, models: Mapping[str, Facts], limit: int
) -> list[tuple[Mapping[str, Any], int]]:
    """The fewest devices over which weights may be spread so that each needs `limit` bytes at most, if so few do: with
    changes of other settings, where fewer devices do then, and without."""
    if not isinstance(settings, TrainSettings) or settings.parallel is not None:
        return []
    found: list[tuple[Mapping[str, Any], int]] = []
    for devices in DEVICES:
        parallel = {"parallel": {"method": "fsdp", "devices": devices}}
        if (alone := _tried(verb, settings, models, limit, parallel)) is not None:
            return [*found, (parallel, alone)]
        for change in () if found else _combinations(settings):
            if (needed := _tried(verb, settings, models, limit, {**parallel, **change})) is not None:
                found.append(({**parallel, **change}, needed))
                break
    return found


def _tried(
    verb: Verb[Any], settings: TrainSettings, models: Mapping[str, Facts], limit: int, change: Mapping[str, Any]
) -> int | None:
    """What the work needs with a change of its settings; None where that is over `limit` or cannot be."""
    try:
        changed = verb.parse({**settings.plain(), **change})
    except SettingsError:
        return None
    needed = verb.estimate(changed, models).memory_bytes
    return needed if needed <= limit and not verb.check(changed, models) else None


def fewer(
    verb: Verb[Any], settings: Settings, models: Mapping[str, Facts], limit: int
) -> list[tuple[Mapping[str, Any], int]]:
    """Few trained weights in the place of all, on the model as it is, else on one in 4 bits: what of these fits into
    `limit` bytes first, with the changes that it takes. The one in 4 bits is to be made: `from` says how."""
    said = settings.plain() if isinstance(settings, TrainSettings) and verb.name == "tune" else {}
    if not said or said["fold"]:
        return []
    method = {"method": "lora"} if "full" in said["method"] else {}
    start = said["from"]
    few = verb.parse({**said, **method})
    in_four = packed(models[start])
    tried: list[tuple[dict[str, Any], Mapping[str, Facts]]] = [(method, models)] if method else []
    if in_four is not None:
        tried.append(({"from": {"quantize": {"from": start, "bits": 4}}, **method}, {**models, start: in_four}))
    for change, facts in tried:
        if verb.check(few, facts):
            continue
        needed = verb.estimate(few, facts).memory_bytes
        found = [({}, needed)] if needed <= limit else ways(verb, few, facts, limit)
        if found:
            return [({**change, **found[0][0]}, found[0][1])]
    return []


def packed(facts: Facts) -> Facts | None:
    """The facts of a model in 4 bits; None where it cannot be packed here."""
    from graft.verbs import verb

    quantize: Verb[Any] = verb("quantize")
    settings = quantize.parse({"from": "base", "bits": 4})
    return None if quantize.check(settings, {"base": facts}) else quantize.facts(settings, {"base": facts}, "")


def _combinations(settings: TrainSettings) -> Iterator[Mapping[str, Any]]:
    """Changes of one setting, then of two, and so on."""
    choices = {name: [None, *(v for v in values if _possible(settings, name, v))] for name, values in CHANGES.items()}
    every = [
        {name: value for name, value in zip(choices, values, strict=True) if value is not None}
        for values in product(*choices.values())
    ]
    kindest = list(CHANGES)
    yield from sorted(
        (c for c in every if c), key=lambda change: (len(change), [kindest.index(name) for name in change])
    )


def _possible(settings: TrainSettings, name: str, value: Any) -> bool:
    if name == "accumulate":
        return value > settings.accumulate and settings.batch_size % value == 0
    if name == "optimizer" and importlib.util.find_spec("bitsandbytes") is None:
        return False
    return bool(getattr(settings, name) != value)


def _written(change: Mapping[str, Any]) -> str:
    """As people write it in a recipe."""
    return ", ".join(f"{name}: {_value(value)}" for name, value in change.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{_written(value)}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _way(change: Mapping[str, Any], size: int) -> str:
    """A change with what it then needs, and with the model in few bits that is to be made for it, if it takes one."""
    beside = ""
    if isinstance(start := change.get("from"), Mapping):
        name = f"{Path(start['quantize']['from']).name}-{start['quantize']['bits']}bit"
        change, beside = {**change, "from": name}, f", beside a model {name}: {_value(start)}"
    return f"{_written(change)} ({size / 1e9:.2f} GB{' each' if 'parallel' in change else ''}){beside}"


def told(found: Fit) -> str:
    """In a line for people."""
    needed = f"{found.memory_bytes / 1e9:.2f} GB"
    if found.fits:
        return f"{found.node}: fits, with {needed}"
    if not found.changes:
        return f"{found.node}: does not fit ({needed}); no setting makes it small enough"
    ways = "; or ".join(_way(*each) for each in found.changes)
    return f"{found.node}: does not fit ({needed}); it would with {ways}"
