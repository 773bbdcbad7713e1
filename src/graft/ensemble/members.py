"""Members in folders: what a configuration says of one, how it is found again, loaded and copied."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from graft import lineage, models
from graft.errors import CheckpointError


def member_entry(name: str, folder: Path, seen_from: Path) -> dict[str, Any]:
    """What a configuration says of a member: name, path from the ensemble's folder, hash, configuration."""
    config = lineage.read_config(folder)
    path = os.path.relpath(folder.resolve(), seen_from.resolve())
    return {"name": name, "path": path, "hash": lineage.hash_model(folder), "config": config}


def load_member(entry: dict[str, Any], folder: Path, dtype: Any) -> PreTrainedModel:
    """The member that an entry of the ensemble in `folder` names.

    Raises CheckpointError where it is missing or is no longer what the ensemble was made of.
    """
    place = folder / entry["path"]
    if not (place / "config.json").exists():
        raise CheckpointError(f"{folder}: member {entry['name']!r} is missing: expected a model in {place}")
    found = lineage.hash_model(place)
    if entry.get("hash") and found != entry["hash"]:
        raise CheckpointError(
            f"{folder}: member {entry['name']!r} has changed since the ensemble was made (hash {found[:12]}, expected "
            f"{entry['hash'][:12]}): make the ensemble anew"
        )
    return models.load(place, dtype=dtype)


def fresh(config: dict[str, Any]) -> PreTrainedModel:
    """A member with random weights."""
    plain = dict(config)
    auto = AutoModelForSeq2SeqLM if plain.get("is_encoder_decoder") else AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(plain.pop("model_type"), **plain))
