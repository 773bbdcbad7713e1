"""Where a model comes from: the manifest `graft.json`, hashes of what it computes, versions."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import graft
from graft import lora
from graft.checkpoint import ADAPTER, INDEX, SINGLE
from graft.data.contents import Content
from graft.disk import atomic_write
from graft.errors import CheckpointError, DiskError
from graft.folders import ADAPTED, read_config
from graft.hashing import Way, hash_file, hash_text, hash_weights, way_of
from graft.lora import is_lora
from graft.machine import boot
from graft.misfits import problems
from graft.pickles import hash_pickles, is_pickled
from graft.settings import Settings

MANIFEST = "graft.json"


class Parent(Settings):
    """A model that this one was made from. `path` is relative to the folder of the child where both lie in one run."""

    name: str
    path: str
    hash: str


class DataUse(Settings):
    """A split that went into the weights."""

    name: str
    split: str
    fingerprint: str
    commits: dict[str, str] = {}
    """Of what is read from the hub: the commit, by the name of the data set."""
    contents: list[Content] = []
    """What the split was read from: one for each data set that it is mixed from."""


class Manifest(Settings):
    """Everything needed to say what a model is and to make it again; stands in `graft.json`."""

    format: int = 1
    name: str
    verb: str
    verb_version: int
    key: str
    parents: list[Parent] = []
    settings: dict[str, Any] = {}
    seed: int = 0
    versions: dict[str, str] = {}
    code: dict[str, Any] = {}
    data: list[DataUse] = []
    hash: str
    files: dict[str, list[int]] = {}
    """Size and time of the last change (ns) of the files of the weights when their hash was taken."""
    config: str = ""
    """sha256 of `config.json`, where there is one: weights are asked whether they fit another one."""
    boot: str | None = None
    """Of the machine's run that wrote the files, where nobody waited until the disk had them."""
    initialisation: str
    vocabulary: str
    architecture: str
    parameters: int
    mergeable: bool = True
    trained_on: list[str] = []
    metrics: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    forced: list[str] = []
    threads: int | None = None
    """Threads that torch computed with, where it did: the same bytes need the same number."""
    created: str = ""
    seconds: float = 0.0


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a model's folder; None where it has none. Raises CheckpointError for a damaged one."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the manifest is damaged ({_damage(error)}); remove the file or make the model anew"
        ) from None


def _damage(error: ValueError) -> str:
    """What is wrong with a manifest, in one line: its first wrong field, or why it is no JSON or no text."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return found[0]["msg"]
    first, *others = problems(Manifest, found, None, ())
    return f"{first}, and {len(others)} more" if others else str(first)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `graft.json`, beside and renamed."""
    atomic_write(Path(folder) / MANIFEST, json.dumps(manifest.plain(), indent=1, ensure_ascii=False) + "\n")


def hash_model(folder: Path, like: str | None = None) -> str:
    """Hash of what a model computes: its weights (those of heads for tasks as well); for an ensemble its configuration
    (with members' hashes), for adapters theirs and their base's hash.

    It is taken as `like` was, a hash to be compared with; else as that of the folder's manifest was, if it has one.
    Raises RequestError where the folder holds no model.
    """
    folder = Path(folder)
    way = _way(folder, like)
    if is_pickled(folder):
        return hash_pickles(folder)
    if is_lora(folder):
        return _hash_lora(folder, way)
    config = read_config(folder)
    if (folder / ADAPTER).exists():
        parts = [config.get(ADAPTED, {}).get("base", {}).get("hash"), hash_file(folder / ADAPTER)]
        parts += [part for path in _heads(folder) for part in (path.parent.name, hash_file(path))]
        said = json.dumps([*parts, {k: v for k, v in config.get(ADAPTED, {}).items() if k != "base"}], sort_keys=True)
        return hash_text(said, "sha256")
    if "head_of" in config.get(ADAPTED, {}):
        both = [hash_model(folder / config[ADAPTED]["head_of"]), hash_file(folder / "head.safetensors")]
        return hash_text(json.dumps(both), "sha256")
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        heads = [[path.parent.name, hash_file(path)] for path in _heads(folder)]
        own = hash_weights(folder, way)
        return hash_text(json.dumps([own, *heads]), way) if heads else own
    return hash_file(folder / "config.json")


def _way(folder: Path, like: str | None) -> Way:
    if like is None and (manifest := read_manifest(folder)) is not None:
        like = manifest.hash
    return "xxh3:" if like is None else way_of(like)


def _heads(folder: Path) -> list[Path]:
    """Files of the weights of heads in a model's folder."""
    return sorted((Path(folder) / "heads").glob("*/head.safetensors"))


def known_hash(folder: Path, like: str | None = None) -> str:
    """Hash of a model's weights: from its manifest, unless a file was changed since, else from the weights.

    `like`: a hash that it is to be compared with, which may have been taken in another way.
    """
    manifest = read_manifest(folder)
    if (
        manifest is not None
        and not touched(folder, manifest)
        and way_of(like or manifest.hash) == way_of(manifest.hash)
    ):
        return manifest.hash
    return hash_model(folder, like)


def stamps(folder: Path) -> dict[str, list[int]]:
    """[size, time of the last change in ns] of every file that decides what the model computes."""
    home = Path(folder)
    files = sorted(path for name in ("*.safetensors", "config.json", "heads/*/*") for path in home.glob(name))
    return {path.relative_to(home).as_posix(): [(at := path.stat()).st_size, at.st_mtime_ns] for path in files}


def touched(folder: Path, manifest: Manifest) -> bool:
    """Whether a file that decides what the model computes may be another than when its hash was taken: by its stamp, or
    as the machine has started anew before the disk had it for sure."""
    if manifest.boot is not None and manifest.boot != boot():
        return True
    now = stamps(folder)
    if manifest.files:
        return now != manifest.files
    written = (Path(folder) / MANIFEST).stat().st_mtime_ns
    return any(changed > written for _, changed in now.values())


def check_as_made(folder: Path) -> None:
    """That a model's weights are those its manifest tells of; hashed where the stamp of a file differs, and only once
    if they are. Raises CheckpointError where they are not.
    """
    manifest = read_manifest(folder)
    if manifest is None or not touched(folder, manifest) or (is_lora(folder) and lora.base_folder(folder) is None):
        return
    if hash_model(folder) != manifest.hash:
        raise CheckpointError(
            f"{folder}: its weights are not those that {MANIFEST} tells of (their hash is another): they were changed "
            f"after it was made; make it anew, or remove {MANIFEST} to take them as they are"
        )
    # a copy has other stamps: noted, where that may be written, so that it is not hashed every time
    with suppress(DiskError, OSError):
        write_manifest(folder, manifest.model_copy(update={"files": stamps(folder), "boot": None}))


def _hash_lora(folder: Path, way: Way) -> str:
    """Hash of an adapter: its factors, how they are scaled, and the base it names where that is to be found."""
    base = lora.base_folder(folder)
    said = {key: value for key, value in lora.read_config(folder).items() if key != "base_model_name_or_path"}
    parts = [hash_weights(folder, way), said, known_hash(base) if base is not None else None]
    return hash_text(json.dumps(parts, sort_keys=True), way)


def versions() -> dict[str, str]:
    """Versions of everything that decides the numbers."""
    import platform

    names = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"graft": graft.__version__, "python": platform.python_version(), **found}


def code_state() -> dict[str, Any]:
    """Git commit of the code with a mark where it has been changed since; `commit` is None outside a checkout."""
    source = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if Path(run("rev-parse", "--show-toplevel")) not in source.parents:
            return {"commit": None, "dirty": None}
        run("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--", str(source)))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def find_models(folder: Path) -> dict[str, tuple[Path, Manifest]]:
    """The models with a manifest in `folder` (a run's folder, its `models`, or one model's), by name."""
    folder = Path(folder)
    places = [folder, *sorted((folder / "models").glob("*")), *sorted(folder.glob("*"))]
    found: dict[str, tuple[Path, Manifest]] = {}
    for place in places:
        manifest = read_manifest(place) if place.is_dir() and not place.name.startswith(".") else None
        if manifest is not None and manifest.name not in found:
            found[manifest.name] = (place, manifest)
    return found
