"""What is known of models with adapters before they exist. Light."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.point import SUBLAYERS, Point
from graft.disk import atomic_write
from graft.folders import ADAPTED, read_config
from graft.settings import parse
from graft.verb import Facts

FOLD = "fold it first ({adapt: {adapters: [...], fold: true}})"
TOGETHER = "put adapters together on their model ({adapt: {adapters: [...], how: average}}), or use an ensemble"


def is_adapted(facts: Facts) -> bool:
    """Whether the model is a frozen one with adapters that lie apart."""
    return facts.config.get("model_type") == ADAPTED


def adapted_facts(start: Facts, points: Iterable[Mapping[str, Any]] = (), *, peft: bool = False) -> Facts:
    """Facts of `start` with an adapter of these points (as plain values) that lies apart: it has no whole weights to
    average. `peft`: it is of one of peft's own types."""
    known = start.config.get(ADAPTED) or {"model_type": start.config.get("model_type")}
    inner = {**known, "peft": {}} if peft else dict(known)
    if said := list(points):
        name = f"adapter {len(known.get('adapters', {})) + 1}"
        inner["adapters"] = {**known.get("adapters", {}), name: said}
        inner["active"] = [*known.get("active", []), [name, 1.0]]
    return replace(start, mergeable=False, config={**start.config, "model_type": ADAPTED, ADAPTED: inner})


def points_of(facts: Facts, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The points of a model's active adapters, as plain values, where they are known, but for those named."""
    entry = facts.config.get(ADAPTED, {})
    return [point for name, points in _active(entry) if name not in without for point in points]


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
