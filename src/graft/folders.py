"""What a model's folder says of itself: its configuration, the folders behind it, its heads. Light."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from graft import lora
from graft.errors import CheckpointError, RequestError
from graft.lora import is_lora

ADAPTED = "graft_adapted"
"""The `model_type` of a folder of adapters, and the key of what `config.json` says of them."""
ENSEMBLES = ("graft_ensemble", "graft_byte_ensemble")
"""Types of configurations that name members."""
OWN = (ADAPTED, *ENSEMBLES)
"""Types of configurations that are graft's own, which `transformers` has no model for."""
COMPANIONS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model*", "*.model", "*.spm",
    "tekken.json", "vocab*", "*_vocab.json", "merges.txt", "bpe.codes", "dict.txt", "normalizer.json",
    "chat_template.*", "additional_chat_templates/*", "*processor_config.json", "generation_config.json",
)  # fmt: skip
"""Patterns of files beside the weights that what is made of several models takes from one of them: all that the
tokenizers and processors of `transformers` are loaded from."""
STALE = (
    "vocab*", "*_vocab.json", "merges.txt", "bpe.codes", "dict.txt", "*.model", "tokenizer.model*", "*.spm",
    "tekken.json", "added_tokens.json",
)  # fmt: skip
"""Patterns of files of a tokenizer that say again what `tokenizer.json` says, and say it of the reference alone."""
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""Names in configurations for how many tokens a model reads at once."""


def companions(*folders: Path) -> dict[str, Path]:
    """Files beside the weights that fit `COMPANIONS`: what each is called inside its folder → where it lies, each once.

    Of a file that several folders have, the first folder's counts.
    """
    found: dict[str, Path] = {}
    for pattern in COMPANIONS:
        for folder in folders:
            for path in sorted(folder.glob(pattern)):
                found.setdefault(path.relative_to(folder).as_posix(), path)
    return {name: path for name, path in found.items() if path.is_file()}


def copy_companions(found: Mapping[str, Path], out: Path, *, stale: bool = True) -> list[str]:
    """Copy what `companions` found into `out`, what fits `STALE` only with `stale`; returns what the files are called
    there."""
    taken = [name for name in found if stale or not any(fnmatch(name, pattern) for pattern in STALE)]
    for name in taken:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[name], out / name)
    return taken


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model's folder. Raises RequestError where there is none, CheckpointError for a damaged one."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise RequestError(f"{folder}: expected a model's folder with config.json, found none")
    found = read_json(path, "configuration")
    if ADAPTED in found and not _names_its_model(found[ADAPTED]):
        raise CheckpointError(f"{path}: expected what the adapters are ({ADAPTED}), found it damaged")
    if str(found.get("model_type")) in ENSEMBLES and (why := ensemble_problem(found)):
        raise CheckpointError(f"{path}: {why}")
    return found


def ensemble_problem(said: Mapping[str, Any]) -> str | None:
    """What no ensemble can be made of in its configuration, such as one that was edited by hand; None where it can."""
    members, weights, gate, draft = (said.get(name) for name in ("members", "weights", "gate", "draft"))
    if not isinstance(members, list) or not members:
        return f"expected an ensemble's members, found {str(members)[:40]!r}"
    for place, entry in enumerate(members):
        known = entry if isinstance(entry, dict) else {}
        if not all(isinstance(known.get(name), str) for name in ("name", "path")) or not known.get("config"):
            return f"expected name, path and config of member {place}, found {', '.join(known) or repr(entry)[:40]}"
    if not isinstance(weights, list) or len(weights) != len(members) or not all(map(_is_finite, weights)):
        return f"expected a weight for each of {len(members)} members, found {str(weights)[:80]}"
    given = gate.get("state", {}).get("outer.bias", []) if isinstance(gate, dict) else members
    if len(given) != len(members):
        return f"expected a gate that gives {len(members)} members their weights, found one for {len(given)}"
    if draft is not None and draft not in [entry["name"] for entry in members]:
        return f"expected a member as draft ({', '.join(entry['name'] for entry in members)}), found {draft!r}"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _names_its_model(said: Any) -> bool:
    """Whether what a configuration says of adapters (or of a head on one) says where their model lies."""
    base = said.get("base") if isinstance(said, dict) else None
    return isinstance(said, dict) and ("head_of" in said or (isinstance(base, dict) and "path" in base))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a JSON file; `what` it is, for the CheckpointError that a damaged one raises."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: the {what} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: the {what} is damaged (expected names with values, found {str(found)[:40]!r})")
    return found


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
        config = read_json(place, "configuration") if place.is_file() else {}
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


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a model's folder are packed, by its configuration."""
    config = read_config(folder) if (Path(folder) / "config.json").is_file() else {}
    return bool(config.get("quantization_config")) and config["model_type"] != ADAPTED
