"""The experts of `{peft: {peft_type: XLORA, adapters: {…}}}`, judged by the facts of what they are. Light."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.adapters.facts import is_adapted, points_of
from graft.adapters.foreign_mixture import expert_names, mixture_point
from graft.adapters.point import Point
from graft.errors import RequestError
from graft.folders import ADAPTED
from graft.lineage import known_hash
from graft.verb import Facts

if TYPE_CHECKING:
    from graft.tune.settings import TuneSettings


class Tried(NamedTuple):
    """A mixture on a model's skeleton: what is wrong, numbers that it trains, numbers of it and its experts."""

    problems: tuple[str, ...]
    trained: int | None = None
    written: int | None = None


def experts_of(settings: TuneSettings) -> dict[str, str]:
    """The models that a tuning mixes, by what it calls them; empty for other methods."""
    return expert_names(settings.method.get("peft", {}).get("config", {})) or {}


def point_of(settings: TuneSettings) -> Point:
    """The point that it is. Raises RequestError for settings that are none."""
    return mixture_point(settings.method["peft"]["config"])


def problems(settings: TuneSettings, models: Mapping[str, Facts]) -> list[str]:
    """What speaks against the mixture, a sentence each; empty if nothing does that is known by now."""
    start, experts = models[settings.from_], experts_of(settings)
    if is_adapted(start):
        return [
            f"{settings.from_} has adapters: expected the frozen model that the experts were made for, on which they "
            "are mixed"
        ]
    found = [wrong for name, ref in experts.items() if (wrong := _unfit(name, ref, models[ref], settings, start))]
    return found or list(tried(settings, models).problems)


def _unfit(name: str, ref: str, expert: Facts, settings: TuneSettings, start: Facts) -> str:
    """Why a model is no expert; empty where it is one."""
    if not is_adapted(expert) and expert.stored != "adapter":
        return f"{ref} is no LoRA adapter: expected as the expert {name} a node tuned with lora and without `fold`"
    entry = expert.config.get(ADAPTED, {}) if is_adapted(expert) else {}
    if "peft" in entry or any(len(entry.get(part, [0])) != 1 for part in ("active", "adapters")):
        return f"{ref}: expected one LoRA adapter as the expert {name}, found several or one of peft's own types"
    other = expert.initialisation != start.initialisation or (is_adapted(expert) and expert.stored != start.stored)
    if other or _for_another(expert, start, settings.from_):
        return f"{ref} was made for another model than {settings.from_}: the experts of a mixture are of one base"
    return ""


def _for_another(expert: Facts, start: Facts, name: str) -> bool:
    """Whether an expert's frozen model is known to be another; two folders may hold the same."""
    below = start.folder or name
    if not expert.frozen or expert.frozen == below:
        return False
    if not Path(expert.frozen).is_absolute():  # a node that is yet to be made
        return True
    # what stands where a node will be made is compared with it when the expert is loaded
    return bool(start.folder) and known_hash(Path(expert.frozen)) != known_hash(Path(start.folder))


def tried(settings: TuneSettings, models: Mapping[str, Facts]) -> Tried:
    """The mixture, tried on the model's skeleton where that and the experts are known."""
    start = models[settings.from_]
    if not start.config.get("architectures"):
        return Tried(())
    experts = {name: _points(models[ref]) for name, ref in experts_of(settings).items()}
    config = settings.method["peft"]["config"]
    return _tried(*(json.dumps(said, sort_keys=True, default=str) for said in (config, start.config, experts)))


def _points(expert: Facts) -> list[dict[str, Any]] | str:
    """The points of an expert, as plain values; of peft's the folder."""
    return points_of(expert) if is_adapted(expert) else expert.folder


@lru_cache(maxsize=64)
def _tried(said: str, configuration: str, experts: str) -> Tried:
    from graft.adapters.foreign import peft_config
    from graft.adapters.foreign_mixture import put_points
    from graft.adapters.peft_format import lora_points
    from graft.adapters.stack import adapters_of
    from graft.adapters.trial import skeleton

    config, model = json.loads(said), skeleton(json.loads(configuration))
    if model is None:
        return Tried(())
    try:
        peft_config(config)
        points = {
            name: lora_points(model, Path(each)) if isinstance(each, str) else [Point(**raw) for raw in each]
            for name, each in json.loads(experts).items()
        }
        stack = adapters_of(put_points(model, config, points))
    except RequestError as error:
        return Tried((str(error),))
    except (RuntimeError, NotImplementedError):  # a model that cannot be tried without weights is tried with them
        return Tried(())
    assert stack is not None
    counts = {name: stack.count(name) for name in stack.points}
    (own, _), *_ = stack.active
    trained = sum(counts[name] for name in [own, *stack.experts_trained_with(own)])
    return Tried((), trained, sum(counts.values()))
