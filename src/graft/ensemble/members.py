"""Members in folders: what a configuration says of one, how it is found again, loaded and copied."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from graft import lineage, models
from graft.adapters.facts import adapter_of_head, frozen_config
from graft.checkpoint import copy_model
from graft.disk import atomic_write
from graft.ensemble.configuration import kind_of
from graft.ensemble.dropout import thinned, twin
from graft.ensemble.sources import Source
from graft.errors import CheckpointError, RequestError
from graft.folders import ADAPTED, ENSEMBLES, read_config
from graft.hashing import shortened
from graft.lora import CONFIG as LORA_CONFIG
from graft.lora import base_folder, is_lora
from graft.one_way import check_one_way
from graft.vocabulary import vocabulary_hash


def member_entry(source: Source, folder: Path, seen_from: Path, own_tokens: bool = False) -> dict[str, Any]:
    """What a configuration says of a member that lies in `folder`: name, path, hash, configuration, extras; with
    `own_tokens`, which it reads by in the ensemble, the hash of its vocabulary."""
    path = os.path.relpath(folder.resolve(), seen_from.resolve())
    return {
        "name": source.name,
        "path": path,
        "hash": lineage.hash_model(folder),
        "config": config_of(folder),
        **({"tokens": vocabulary_hash(home_of(folder))} if own_tokens else {}),
        **source.extras,
    }


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration of the model in a folder; of an adapter's, that of the model it changes."""
    return frozen_config(read_config(home_of(folder)))


def home_of(folder: Path) -> Path:
    """Where configuration and tokenizer lie: the folder, or for an adapter of peft its base's.

    Raises CheckpointError where that is not there.
    """
    if not is_lora(folder):
        return folder
    base = base_folder(folder)
    if base is None:
        raise CheckpointError(f"{folder}: the adapter's base is missing: expected a model where it says")
    return base


def copied(folder: Path, target: Path, name: str, copies: dict[Path, str]) -> str:
    """Copy a member's folder, and what lies elsewhere that it is loaded from (the base of an adapter, the members of an
    ensemble), into `target/members`, each once; its path from `target`.

    `copies` holds what has been copied: the path from `target`, by the folder. Raises CheckpointError where a member of
    a member is missing or has changed.
    """
    own, inside = folder.resolve(), (target / "members").resolve()
    if own.is_relative_to(inside):  # an ensemble is written over itself
        copies[own] = own.relative_to(target.resolve()).as_posix()
    if own in copies:
        return copies[own]
    while f"members/{name}" in copies.values():
        name += "-"
    copies[own] = f"members/{name}"
    copy_model(own, target / copies[own], ["checkpoints"])
    base = _base_of(own)
    if base is not None:
        _rename_base(target / copies[own], os.path.basename(copied(base, target, f"{name}-base", copies)))
    _copy_members(own, target, name, copies)
    return copies[own]


def _copy_members(own: Path, target: Path, name: str, copies: dict[Path, str]) -> None:
    """Of an ensemble that was copied from `own`: copy its members that lie elsewhere, and let it name the copies."""
    place = target / copies[own]
    config = {} if is_lora(own) else read_config(own)
    entries = config.get("members") if config.get("model_type") in ENSEMBLES else None
    elsewhere = [entry for entry in entries or () if not (own / entry["path"]).resolve().is_relative_to(own)]
    for entry in elsewhere:
        found = target / copied(_checked(entry, own), target, f"{name}-{entry['name']}", copies)
        entry.update(path=os.path.relpath(found, place), hash=lineage.hash_model(found), config=config_of(found))
    if not elsewhere:
        return
    atomic_write(place / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (manifest := lineage.read_manifest(place)) is not None:
        parents = [_moved(parent, own, target, place, copies) for parent in manifest.parents]
        now = {"hash": lineage.hash_model(place), "parents": parents}
        lineage.write_manifest(place, manifest.model_copy(update=now))


def _moved(parent: lineage.Parent, own: Path, target: Path, place: Path, copies: Mapping[Path, str]) -> lineage.Parent:
    """What a manifest says of a parent, seen from the copy in `place` of the folder `own`."""
    copy = copies.get((own / parent.path).resolve())
    return parent if copy is None else parent.model_copy(update={"path": os.path.relpath(target / copy, place)})


def _base_of(folder: Path) -> Path | None:
    """The folder of the model that an adapter's folder names; None for a model of its own."""
    if is_lora(folder):
        return home_of(folder)
    if adapter_of_head(folder) is not None:
        raise RequestError(
            f"{folder} is a head beside an adapter, which cannot stand alone: expected a model of its own, with the "
            "adapter folded (`fold: true`) and its head split out (graft head)"
        )
    adapted = read_config(folder).get(ADAPTED)
    return None if adapted is None else folder / adapted["base"]["path"]


def _rename_base(folder: Path, beside: str) -> None:
    """Let the adapter in `folder` name the base that lies beside it."""
    path = folder / (LORA_CONFIG if is_lora(folder) else "config.json")
    config = json.loads(path.read_text())
    if is_lora(folder):
        config["base_model_name_or_path"] = f"../{beside}"
    else:
        config[ADAPTED]["base"]["path"] = f"../{beside}"
    atomic_write(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_members(entries: Sequence[Mapping[str, Any]], folder: Path, dtype: Any) -> list[PreTrainedModel]:
    """The members that the entries of the ensemble in `folder` name; what several of them share is in memory once.

    Raises CheckpointError where one is missing or is no longer what the ensemble was made of.
    """
    found: Loaded = {}
    return [_load_entry(entry, folder, dtype, found) for entry in entries]


def check_members(folder: Path) -> None:
    """That the members which the ensemble in `folder` names are there and as they were.

    Raises CheckpointError as `load_members`.
    """
    for entry in read_config(folder)["members"]:
        _checked(entry, folder)


Loaded = dict[tuple[Any, ...], Any]
"""Models that are in memory already, by folder, type and device."""


def _load_entry(entry: Mapping[str, Any], folder: Path, dtype: Any, found: Loaded) -> PreTrainedModel:
    return loaded(_checked(entry, folder), entry, dtype=dtype, found=found)


def _checked(entry: Mapping[str, Any], folder: Path) -> Path:
    """Where a member of the ensemble in `folder` lies. Raises CheckpointError where it is missing or has changed."""
    place = folder / entry["path"]
    if not (place / "config.json").exists() and not is_lora(place):
        raise CheckpointError(f"{folder}: member {entry['name']!r} is missing: expected a model in {place}")
    tokens = str(entry.get("tokens", "none:"))
    if not tokens.startswith("none:") and vocabulary_hash(home_of(place)) != tokens:
        raise CheckpointError(
            f"{folder}: the tokenizer of member {entry['name']!r} has changed since the ensemble was made: put the one "
            "that it had back, or make the ensemble anew"
        )
    home_of(place)
    now = lineage.hash_model(place, entry.get("hash") or None)
    if entry.get("hash") and now != entry["hash"]:
        raise CheckpointError(
            f"{folder}: member {entry['name']!r} has changed since the ensemble was made (hash "
            f"{shortened(now)}, expected {shortened(entry['hash'])}): make the ensemble anew"
        )
    return place


def loaded(
    place: Path, extras: Mapping[str, Any], *, dtype: Any = None, device: str | None = None, found: Loaded | None = None
) -> PreTrainedModel:
    """The model in `place` with what `extras` say of it.

    Weights that are in `found` already are not held twice: those of the folder itself, of the model that an adapter
    changes, and all that are the same as those of the same name in another.
    """
    wanted, where = extras.get("dtype") or dtype, extras.get("device") or device
    key = (place.resolve(), str(wanted), where)
    known = {} if found is None else found
    if key not in known:
        if is_lora(place):
            base = loaded(home_of(place), {}, dtype=wanted, device=where, found=known)
            known[key] = _adapted(twin(base), place)
        else:
            model = models.load(place, dtype=wanted, device=where)
            if kind_of([config_of(place)]) == "CausalLM":
                check_one_way(model)
            known[key] = share(model, list(known.values()))
    dropout = extras.get("dropout")
    return known[key] if dropout is None else thinned(known[key], dropout["share"], dropout["seed"])


def _adapted(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter of peft, which computes beside its weights and leaves them as they are."""
    from graft.adapters.peft_format import adopt_peft

    adopt_peft(model, folder, "adapter")
    return model.eval()


def share(model: PreTrainedModel, others: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """The model (in place) with the very tensors of `others` where theirs of the same name are equal to its own."""
    there = [dict(other.named_parameters(remove_duplicate=False)) for other in others]
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        same = next((other[name] for other in there if name in other and _equal(other[name], weight)), None)
        if same is not None:
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, same)
    return model


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)


def fresh(config: dict[str, Any]) -> PreTrainedModel:
    """A member with random weights."""
    plain = dict(config)
    autos = {
        "CausalLM": AutoModelForCausalLM,
        "Seq2SeqLM": AutoModelForSeq2SeqLM,
        "SequenceClassification": AutoModelForSequenceClassification,
    }
    auto = autos[kind_of([plain])]
    return auto.from_config(AutoConfig.for_model(plain.pop("model_type"), **plain))


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first weight is. As `next(module.parameters()).device`, which looks at more of the module than a
    step of decoding has time for."""
    below = [module]
    while below:
        part = below.pop()
        for weight in part._parameters.values():
            if weight is not None:
                return weight.device
        below += [each for each in reversed(part._modules.values()) if each is not None]
    return torch.device("cpu")


def nan_words(entry: Mapping[str, Any]) -> str:
    """What is said of a member whose logits are NaN."""
    return f"member {entry['name']!r} ({entry['path']}) gives NaN logits: check its weights"
