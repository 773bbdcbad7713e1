"""The facts of a model's folder, from which it is known what may be done with it: read without its weights. Light."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft import lora
from graft.checkpoint import ADAPTER, TensorHeader, read_file_headers, read_headers
from graft.errors import CheckpointError
from graft.folders import ADAPTED, architecture_of, folders_behind, heads_of, is_quantised, read_config
from graft.hashing import hash_weights
from graft.lineage import check_as_made, read_manifest
from graft.lora import is_lora
from graft.pickles import hash_pickles, is_pickled, pickled_bytes
from graft.verb import Facts
from graft.vocabulary import tokenizer_of, vocabulary_hash


def facts_of(folder: Path) -> Facts:
    """The facts of a model's folder: from its manifest, or from configuration, headers and tokenizer without one.

    Raises RequestError where it holds no model, CheckpointError where it is damaged or was changed since it was made.
    """
    folder = Path(folder)
    check_as_made(folder)
    place = str(folder.resolve())
    found = replace(_facts_of(folder), tokenizer=tokenizer_of(folder), heads=heads_of(folder), folder=place)
    if is_quantised(folder) or (ADAPTED in found.config and found.config.get("quantization_config")):
        return replace(found, stored="quantised", start=None)
    tells = found.initialisation.startswith("unknown:") and list(folder.glob("*.safetensors")) and not is_lora(folder)
    return replace(found, start=folder) if tells and ADAPTED not in found.config else found


def _facts_of(folder: Path) -> Facts:
    if is_lora(folder):
        return replace(_lora_facts(folder), stored="pickle") if is_pickled(folder) else _lora_facts(folder)
    config = read_config(folder)
    if is_pickled(folder):
        return _pickled_facts(folder, config)
    manifest = read_manifest(folder)
    if manifest is not None and not manifest.mergeable:
        return Facts(
            manifest.architecture, manifest.initialisation, manifest.vocabulary, manifest.parameters,
            _bytes_behind(folder), config, False, frozenset(manifest.trained_on), frozen=_below(folder, config),
        )  # fmt: skip
    if ADAPTED in config and "head_of" in config[ADAPTED]:
        own = facts_of(folder / config[ADAPTED]["head_of"])
        return replace(own, architecture="encoder", config=config, bytes=_bytes_behind(folder))
    if ADAPTED in config:
        place = folder / config[ADAPTED]["base"]["path"]
        if not (place / "config.json").is_file() and not is_lora(place):
            return _homeless(folder, config, False)
        if not (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder}: expected the adapters' weights in {ADAPTER}, found no such file")
        read_file_headers(folder / ADAPTER)
        found = replace(facts_of(place), config=config, mergeable=False, bytes=_bytes_behind(folder))
        return replace(found, frozen=_below(folder, config))
    headers = read_headers(folder)
    size = sum(h.end - h.start for h in headers.values())
    if manifest is not None:
        return Facts(
            manifest.architecture,
            manifest.initialisation,
            manifest.vocabulary,
            manifest.parameters,
            size,
            config,
            True,
            frozenset(manifest.trained_on),
        )
    count = parameters_in(headers.values(), config)
    # without a manifest nothing says what the weights grew from: each folder is then its own, by its content
    return Facts(
        architecture_of(config), f"unknown:{hash_weights(folder)}", vocabulary_hash(folder), count, size, config
    )


def _below(folder: Path, config: Mapping[str, Any]) -> str:
    """Where the model below adapters lies; empty where there is none."""
    path = config.get(ADAPTED, {}).get("base", {}).get("path")
    return str((folder / path).resolve()) if path else ""


def _bytes_behind(folder: Path) -> int:
    """Size of all weights that a model is loaded from: its own, its members', its base's, each folder's once."""
    return sum(path.stat().st_size for place in folders_behind(folder) for path in place.glob("*.safetensors"))


def parameters_in(headers: Iterable[TensorHeader], config: Mapping[str, Any]) -> int:
    """Parameters that the tensors of a folder stand for; a byte of packed ones holds two of 4 bits."""
    packed = config.get("quantization_config")
    if not packed:
        return sum(header.count for header in headers)
    each = 2 if packed.get("load_in_4bit") else 1
    constants = (".SCB", ".weight_format", ".absmax", ".quant_map")
    own = [h for h in headers if ".quant_state." not in h.name and ".nested_" not in h.name]
    return sum(h.count * (each if h.dtype == "U8" else 1) for h in own if not h.name.endswith(constants))


def _pickled_facts(folder: Path, config: dict[str, Any]) -> Facts:
    """What is known without opening a pickle."""
    size = pickled_bytes(folder)
    width = 4 if config.get("dtype", config.get("torch_dtype", "float32")) == "float32" else 2
    start = f"unknown:{hash_pickles(folder)[:32]}"
    return Facts(architecture_of(config), start, vocabulary_hash(folder), size // width, size, config, stored="pickle")


def _homeless(folder: Path, config: Mapping[str, Any], mergeable: bool) -> Facts:
    """Those of an adapter whose base is not on this machine: next to nothing."""
    spoken = vocabulary_hash(folder) if (folder / "tokenizer.json").is_file() else "none:"
    return Facts("unknown", "unknown:", spoken, 0, 0, config, mergeable)


def _lora_facts(folder: Path) -> Facts:
    """Those of the base that an adapter names; of a base that is not to be found nothing is known."""
    base = lora.base_folder(folder)
    manifest = read_manifest(folder)
    trained_on = frozenset(manifest.trained_on) if manifest is not None else frozenset()
    if base is None:
        return replace(_homeless(folder, {}, True), trained_on=trained_on, stored="adapter")
    found = facts_of(base)
    spoken = vocabulary_hash(folder) if (folder / "tokenizer.json").is_file() else found.vocabulary
    known = found.trained_on | trained_on
    return replace(found, vocabulary=spoken, stored="adapter", trained_on=known, frozen=str(base.resolve()))
