"""Members in folders: what a configuration says of one, how it is found again, loaded and copied."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from graft import lineage, models
from graft.ensemble.dropout import thinned
from graft.ensemble.sources import Source
from graft.errors import CheckpointError


def member_entry(source: Source, folder: Path, seen_from: Path) -> dict[str, Any]:
    """What a configuration says of a member that lies in `folder`: name, path, hash, configuration, extras."""
    config = lineage.read_config(folder)
    path = os.path.relpath(folder.resolve(), seen_from.resolve())
    return {"name": source.name, "path": path, "hash": lineage.hash_model(folder), "config": config, **source.extras}


def load_members(entries: Sequence[Mapping[str, Any]], folder: Path, dtype: Any) -> list[PreTrainedModel]:
    """The members that the entries of the ensemble in `folder` name; what several of them share is in memory once.

    Raises CheckpointError where one is missing or is no longer what the ensemble was made of.
    """
    found: Loaded = {}
    return [_load_entry(entry, folder, dtype, found) for entry in entries]


Loaded = dict[tuple[Any, ...], Any]
"""Models that are in memory already, by folder, type and device."""


def _load_entry(entry: Mapping[str, Any], folder: Path, dtype: Any, found: Loaded) -> PreTrainedModel:
    place = folder / entry["path"]
    if not (place / "config.json").exists():
        raise CheckpointError(f"{folder}: member {entry['name']!r} is missing: expected a model in {place}")
    now = lineage.hash_model(place)
    if entry.get("hash") and now != entry["hash"]:
        raise CheckpointError(
            f"{folder}: member {entry['name']!r} has changed since the ensemble was made (hash {now[:12]}, expected "
            f"{entry['hash'][:12]}): make the ensemble anew"
        )
    return loaded(place, entry, dtype=dtype, found=found)


def loaded(
    place: Path, extras: Mapping[str, Any], *, dtype: Any = None, device: str | None = None, found: Loaded | None = None
) -> PreTrainedModel:
    """The model in `place` with what `extras` say of it; its weights are those in `found` if it is there already."""
    wanted, where = extras.get("dtype") or dtype, extras.get("device") or device
    key = (place.resolve(), str(wanted), where)
    known = {} if found is None else found
    if key not in known:
        known[key] = models.load(place, dtype=wanted, device=where)
    dropout = extras.get("dropout")
    return known[key] if dropout is None else thinned(known[key], dropout["share"], dropout["seed"])


def fresh(config: dict[str, Any]) -> PreTrainedModel:
    """A member with random weights."""
    plain = dict(config)
    auto = AutoModelForSeq2SeqLM if plain.get("is_encoder_decoder") else AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(plain.pop("model_type"), **plain))
