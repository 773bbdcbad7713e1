"""What is known of models with adapters before they exist. Light."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.checkpoint import atomic_write
from graft.lineage import ADAPTED, read_config
from graft.verb import Facts


def is_adapted(facts: Facts) -> bool:
    """Whether the model is a frozen one with adapters that lie apart."""
    return facts.config.get("model_type") == ADAPTED


def adapted_facts(start: Facts) -> Facts:
    """Facts of `start` with an adapter that lies apart: it has no whole weights to average."""
    if is_adapted(start):
        return start
    inner: dict[str, Any] = {"model_type": start.config.get("model_type")}
    return replace(start, mergeable=False, config={**start.config, "model_type": ADAPTED, ADAPTED: inner})


def folded_facts(start: Facts) -> Facts:
    """Facts of `start` with adapters folded in: an ordinary model again."""
    return replace(start, mergeable=True, config=frozen_config(dict(start.config)))


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


def place_base(folder: Path, base: Path, seen_from: Path) -> None:
    """Let the adapters in `folder`, which will stand at `seen_from`, name the frozen model in `base`."""
    config = read_config(folder)
    config[ADAPTED]["base"]["path"] = os.path.relpath(base.resolve(), seen_from.resolve())
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
