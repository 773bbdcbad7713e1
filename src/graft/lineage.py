"""Where a model comes from: the manifest `graft.json`, content hashes, versions, and the facts of a folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import graft
from graft import lora
from graft.checkpoint import ADAPTER, INDEX, SINGLE, TensorHeader, read_headers
from graft.data.contents import Content
from graft.disk import atomic_write
from graft.errors import CheckpointError, DiskError, RequestError
from graft.hashing import Way, hash_file, hash_text, hash_weights, way_of
from graft.lora import is_lora
from graft.machine import boot
from graft.misfits import problems
from graft.pickles import hash_pickles, is_pickled, pickled_bytes
from graft.settings import Settings
from graft.verb import Facts

MANIFEST = "graft.json"
ADAPTED = "graft_adapted"
"""The `model_type` of a folder of adapters, and the key of what `config.json` says of them."""
GENERAL_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names under which a tokenizer is saved that is all in its `tokenizer.json`."""
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""Names in configurations for how many tokens a model reads at once."""
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "tekken.json")
"""Files that a tokenizer may be in that is not in `tokenizer.json`."""


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
    if is_lora(folder):
        return _hash_lora(folder, way)
    if is_pickled(folder):
        return hash_pickles(folder)
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


def vocabulary_hash(folder: Path) -> str:
    """Hash of the token strings with their ids; the same for all models with the same vocabulary."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        return "none:" + hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]
    return _vocabulary_hash(_tokenizer(path, _file_state(path)))


def token_ids(folder: Path) -> Mapping[str, int] | None:
    """Token string → id, from `tokenizer.json`; None where there is none. Raises CheckpointError for a damaged one."""
    path = Path(folder) / "tokenizer.json"
    return _token_ids(_tokenizer(path, _file_state(path))) if path.exists() else None


def _file_state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True)
class _Tokenizer:
    """A file with a tokenizer; those of one family are mostly the same, byte by byte, and read once."""

    content: str
    path: Path = field(compare=False)


@lru_cache(maxsize=64)
def _tokenizer(path: Path, state: tuple[int, ...]) -> _Tokenizer:
    return _Tokenizer(hash_file(path), path)


@lru_cache(maxsize=64)
def _vocabulary_hash(tokenizer: _Tokenizer) -> str:
    return hash_vocabulary(_token_ids(tokenizer))


@lru_cache(maxsize=8)
def _token_ids(tokenizer: _Tokenizer) -> Mapping[str, int]:
    path = tokenizer.path
    try:
        raw = json.loads(path.read_text())
        tokens = raw.get("model", {}).get("vocab", {})
        pairs = tokens if isinstance(tokens, dict) else {entry[0]: place for place, entry in enumerate(tokens)}
        return {**pairs, **{entry["content"]: entry["id"] for entry in raw.get("added_tokens", [])}}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a tokenizer, found a damaged file ({error!r})") from None


def tokenizer_of(folder: Path) -> frozenset[str] | None:
    """What the tokenizer in a folder has of `text`, `end`, `mask`, `sentinels`; nothing where there is none.

    An adapter without one has its base's. None where only loading it can tell.
    """
    folder = Path(folder)
    if is_lora(folder) and not (folder / "tokenizer.json").is_file():
        folder = lora.base_folder(folder) or folder
    tokens = token_ids(folder)
    if tokens is None:
        return None if any(any(folder.glob(name)) for name in TOKENIZER_FILES) else frozenset()
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said |= _json(folder / name, "tokenizer's settings") if (folder / name).is_file() else {}
    general = said.get("tokenizer_class") in GENERAL_TOKENIZERS
    # classes of a model type have special tokens that their files need not name
    mask = said.get("mask_token") or (not general and {"<mask>", "[MASK]"} & tokens.keys())
    there = {
        "text": True,
        "end": said.get("eos_token") or said.get("sep_token") or not general,
        "mask": mask,
        "sentinels": "<extra_id_0>" in tokens,
    }
    return frozenset(name for name, found in there.items() if found)


def hash_vocabulary(tokens: Mapping[str, int]) -> str:
    """sha256 of token strings with their ids, in the order of the ids."""
    plain = json.dumps(sorted(tokens.items(), key=itemgetter(1, 0)), ensure_ascii=False)
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model's folder. Raises RequestError where there is none, CheckpointError for a damaged one."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise RequestError(f"{folder}: expected a model's folder with config.json, found none")
    found = _json(path, "configuration")
    if ADAPTED in found and not _names_its_model(found[ADAPTED]):
        raise CheckpointError(f"{path}: expected what the adapters are ({ADAPTED}), found it damaged")
    return found


def _names_its_model(said: Any) -> bool:
    """Whether what a configuration says of adapters (or of a head on one) says where their model lies."""
    base = said.get("base") if isinstance(said, dict) else None
    return isinstance(said, dict) and ("head_of" in said or (isinstance(base, dict) and "path" in base))


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: the {what} is damaged ({error})") from None


def parts_of(folder: Path) -> list[Path]:
    """Folders of the models that one is loaded from beside its own weights: an ensemble's members, an adapter's base,
    the adapter below a head.

    One that is not there is left out.
    """
    folder = Path(folder)
    if is_lora(folder):
        found = [lora.base_folder(folder)]
    else:
        config = read_config(folder)
        named = [member for member in config.get("members", ()) if isinstance(member, dict) and member.get("path")]
        said = config.get(ADAPTED, {})
        named += [said["base"]] if "base" in said else [{"path": said["head_of"]}] if "head_of" in said else []
        found = [folder / one["path"] for one in named]
    return [place for place in found if place is not None and place.is_dir()]


def folders_behind(folder: Path) -> list[Path]:
    """All folders that a model is loaded from: its own, its parts' (`parts_of`) and theirs, each once."""
    found, waiting = dict[Path, None](), [Path(folder).resolve()]
    while waiting:
        place = waiting.pop()
        if place not in found:
            found[place] = None
            waiting += [part.resolve() for part in parts_of(place)]
    return list(found)


HEADS = {
    "classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "spans": "ForQuestionAnswering",
}
"""Kind of a head for a task → how the names of its classes end."""


def head_kind(config: Mapping[str, Any]) -> str | None:
    """The kind of head that a configuration names; None where it is one for language modelling."""
    names = " ".join(config.get("architectures") or [])
    return next((kind for kind, suffix in HEADS.items() if suffix in names), None)


def heads_of(folder: Path) -> dict[str, str]:
    """Task → kind of the heads in a model's folder: its own, or those in folders of its `heads`."""
    folder = Path(folder)
    found = {}
    for place in (folder / "config.json", *sorted((folder / "heads").glob("*/config.json"))):
        config = _json(place, "configuration") if place.is_file() else {}
        if kind := head_kind(config):
            found[config.get("graft_task", {}).get("name", place.parent.name)] = kind
    return found


def architecture_of(config: Mapping[str, Any]) -> str:
    """`decoder`, `encoder` or `encoder-decoder`, from a configuration."""
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    names = " ".join(config.get("architectures") or [])
    kinds = ("MaskedLM", "Classification", "QuestionAnswering", "EncoderModel")
    return "encoder" if any(word in names for word in kinds) else "decoder"


def facts_of(folder: Path) -> Facts:
    """The facts of a model's folder: from its manifest, or from configuration, headers and tokenizer without one.

    Raises RequestError where it holds no model, CheckpointError where it is damaged or was changed since it was made.
    """
    folder = Path(folder)
    check_as_made(folder)
    place = str(folder.resolve())
    found = replace(_facts_of(folder), tokenizer=tokenizer_of(folder), heads=heads_of(folder), folder=place)
    if is_quantised(folder):
        return replace(found, stored="quantised", start=None)
    tells = found.initialisation.startswith("unknown:") and list(folder.glob("*.safetensors")) and not is_lora(folder)
    return replace(found, start=folder) if tells and ADAPTED not in found.config else found


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a model's folder are packed, by its configuration."""
    config = read_config(folder) if (Path(folder) / "config.json").is_file() else {}
    return bool(config.get("quantization_config")) and config["model_type"] != ADAPTED


def _facts_of(folder: Path) -> Facts:
    if is_lora(folder):
        return _lora_facts(folder)
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
