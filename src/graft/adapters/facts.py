"""What is known of models with adapters before they exist. Light."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft import lineage
from graft.adapters.point import SUBLAYERS, Point
from graft.disk import atomic_write
from graft.errors import CheckpointError
from graft.folders import ADAPTED, read_config
from graft.hashing import shortened
from graft.lora import is_lora
from graft.settings import parse
from graft.verb import Facts

FOLD = "fold it first ({adapt: {adapters: [...], fold: true}})"
TOGETHER = "put adapters together on their model ({adapt: {adapters: [...], how: average}}), or use an ensemble"


def is_adapted(facts: Facts) -> bool:
    """Whether the model is a frozen one with adapters that lie apart."""
    return facts.config.get("model_type") == ADAPTED


def adapted_facts(
    start: Facts, points: Iterable[Mapping[str, Any]] = (), *, peft: bool = False, tasks: Sequence[str] = ()
) -> Facts:
    """Facts of `start` with an adapter of these points (as plain values) that lies apart: it has no whole weights to
    average. `peft`: it is of one of peft's own types; `tasks`: it mixes by these, of which the first is chosen."""
    known = start.config.get(ADAPTED) or {"model_type": start.config.get("model_type")}
    inner = {**known, "peft": {}} if peft else dict(known)
    if tasks:
        inner["tasks"] = {"names": list(tasks), "chosen": tasks[0]}
    if said := list(points):
        name = f"{YET}{len(known.get('adapters', {})) + 1}"
        inner["adapters"] = {**known.get("adapters", {}), name: said}
        inner["active"] = [*known.get("active", []), [name, 1.0]]
    return replace(start, mergeable=False, config={**start.config, "model_type": ADAPTED, ADAPTED: inner})


def tasks_in(facts: Facts) -> list[str] | None:
    """The names of the tasks that a model's adapter mixes by; None where it has no such adapter."""
    said = facts.config.get(ADAPTED, {}).get("tasks")
    return list(said["names"]) if isinstance(said, dict) and isinstance(said.get("names"), list) else None


def points_of(facts: Facts, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The points of a model's active adapters, as plain values, where they are known, but for those named."""
    return [point for points in active_points(facts, without) for point in points]


def active_points(facts: Facts, without: Sequence[str] = ()) -> list[list[dict[str, Any]]]:
    """The points of each of a model's active adapters, as plain values, where they are known, but for those named."""
    return [points for name, points in _active(facts.config.get(ADAPTED, {})) if name not in without]


def adapter_names(facts: Facts) -> list[str] | None:
    """The names of a model's adapters; None where one is yet to be made, which has no name before."""
    names = list(facts.config.get(ADAPTED, {}).get("adapters", {}))
    return None if any(name.startswith(YET) for name in names) else names


YET = "adapter "
"""How the names of adapters that are not made yet begin; those of finished ones have no space."""


def _active(entry: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(name, entry.get("adapters", {}).get(name, [])) for name, _ in entry.get("active", [])]


def obstacles(entry: Mapping[str, Any]) -> list[str]:
    """Why what `config.json` says of adapters is no change of their model's weights that can be worked out a piece at
    a time, a sentence for each point, with what works instead; empty where it is. Raises SettingsError for a point that
    is none."""
    if "peft" in entry:
        return [f"adapters of peft's own types are no changes that a merge can read: {FOLD}"]
    if HEAD_OF in entry:
        return ["a head beside an adapter has no weights to merge: name the adapter that it stands on"]
    parsed = [(name, parse(Point, raw, (name,))) for name, points in _active(entry) for raw in points]
    return [f"{name}, {point.form} on {', '.join(point.on)}, {why}" for name, point in parsed if (why := _bars(point))]


def _bars(point: Point) -> str:
    """Why a point cannot be read as a change of weights, with what works; empty where it can."""
    if point.form not in ("linear", "scale", "bias"):
        return f"is no change of weights: {TOGETHER}"
    if any(word in SUBLAYERS for place in point.on for word in place.split("|")):
        return f"spans layers and so has no weight to fold into: {TOGETHER}"
    if point.names_experts:
        return f"changes each of several experts in one parameter, of which a merge knows no part: {FOLD}"
    inside = any(place.startswith("before ") or place == "intermediate" for place in point.on)
    if point.form == "bias" and inside:
        return f"moves a bias by the whole weight times it: {FOLD}"
    return ""


def folded_facts(start: Facts) -> Facts:
    """Facts of `start` with adapters folded in: an ordinary model again."""
    return replace(start, mergeable=True, config=frozen_config(dict(start.config)), frozen="", folder="")


def frozen_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the frozen model below adapters; `config` itself where it has none."""
    if config.get("model_type") != ADAPTED:
        return config
    return {key: value for key, value in config.items() if key != ADAPTED} | {
        "model_type": config[ADAPTED]["model_type"]
    }


HEAD_OF = "head_of"
"""What `config.json` of a head beside an adapter says: the adapter's folder, relative."""


def adapter_of_head(folder: Path) -> Path | None:
    """The folder of the adapter that the head in `folder` stands on; None where it holds no such head."""
    if not (folder / "config.json").is_file():
        return None
    said = (read_config(folder).get(ADAPTED) or {}).get(HEAD_OF)
    return None if said is None else folder / said


def adapted_base(folder: Path) -> Path | None:
    """The folder of the frozen model that the adapters in `folder` name; None where it holds a model of its own."""
    if not (folder / "config.json").is_file():
        return None
    if (place := adapter_of_head(folder)) is not None:
        return adapted_base(place)
    said = read_config(folder).get(ADAPTED)
    return None if said is None else folder / said["base"]["path"]


def base_there(folder: Path) -> Path | None:
    """`adapted_base`, where a model is in it."""
    base = adapted_base(folder)
    return base if base is not None and (base / "config.json").is_file() else None


def place_base(folder: Path, base: Path, seen_from: Path) -> None:
    """Let the adapters in `folder`, which will stand at `seen_from`, name the frozen model in `base`."""
    config = read_config(folder)
    config[ADAPTED]["base"]["path"] = os.path.relpath(base.resolve(), seen_from.resolve())
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def entry_of(folder: Path) -> dict[str, Any]:
    """What `config.json` says of the adapters. Raises CheckpointError where it says nothing that can be read."""
    entry: dict[str, Any] = read_config(folder).get(ADAPTED) or {}
    if not _is_entry(entry):
        raise CheckpointError(f"{folder}/config.json: expected what the adapters are ({ADAPTED}), found it damaged")
    if entry.get("format") != 1:
        raise CheckpointError(f"{folder}: expected adapters of format 1, found {entry.get('format')}: update graft")
    return entry


def _is_entry(entry: Any) -> bool:
    """Whether all that is needed is there, each of its type."""
    try:
        names = {name for name, points in entry["adapters"].items() if all(isinstance(p, dict) for p in points)}
        active = [name for name, weight in entry["active"] if isinstance(weight, int | float)]
        said = [entry["model_type"], entry["base"]["path"], entry["base"]["hash"]]
        whole = len(names) == len(entry["adapters"]) and len(active) == len(entry["active"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return whole and set(active) <= names and all(isinstance(each, str) for each in said)


def check_base(folder: Path, entry: Mapping[str, Any], place: Path) -> None:
    """Raises CheckpointError where the frozen model is missing or is not the one the adapters were made for."""
    if not (place / "config.json").is_file() and not is_lora(place):
        raise CheckpointError(
            f"{folder}: the adapters' base is missing: expected a model in {place}; bring it there, or give its folder"
        )
    expected = entry["base"]["hash"]
    found = lineage.known_hash(place, expected)
    if found != expected:
        raise CheckpointError(
            f"{folder}: the adapters were made for another base: expected the weights with hash "
            f"{shortened(expected)}, found {shortened(found)} in {place}; give the folder of the right model, or tune "
            "anew"
        )
