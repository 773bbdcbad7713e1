"""What tokens a folder's tokenizer knows, read from its files without loading it. Light."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from graft import lora
from graft.errors import CheckpointError
from graft.folders import read_json
from graft.hashing import hash_file
from graft.lora import is_lora

GENERAL_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names under which a tokenizer is saved that is all in its `tokenizer.json`."""
ADDED = "added_tokens.json"
LISTS = ("vocab.json", "vocab.txt")
"""Files that list tokens, by id or in their order."""
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "tekken.json")
"""Files that a tokenizer may be in that is not in `tokenizer.json`."""


def vocabulary_hash(folder: Path) -> str:
    """Hash of the token strings with their ids; the same for all models with the same vocabulary.

    From `tokenizer.json`, else from the plain lists of tokens that older tokenizers are saved as; `none:…`, another one
    for each folder, where there is neither.
    """
    path = Path(folder) / "tokenizer.json"
    if path.exists():
        return _vocabulary_hash(_tokenizer(path, _file_state(path)))
    for listed in (Path(folder) / name for name in LISTS if (Path(folder) / name).is_file()):
        added = listed.with_name(ADDED)
        states = tuple(_file_state(path) for path in (listed, added) if path.is_file())
        if (found := _listed_hash(listed, states)) is not None:
            return found
    return "none:" + hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def _listed_hash(path: Path, states: tuple[tuple[int, ...], ...]) -> str | None:
    """Of a list of tokens, with those that were added beside it; None where it is another list."""
    try:
        text, added = path.read_text(), path.with_name(ADDED)
        tokens = json.loads(text) if path.suffix == ".json" else _numbered(text)
        tokens |= json.loads(added.read_text()) if added.is_file() else {}
    except (ValueError, TypeError):
        return None
    numbered = isinstance(tokens, dict) and all(isinstance(number, int) for number in tokens.values())
    return hash_vocabulary(tokens) if numbered else None


def _numbered(text: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(text.removesuffix("\n").split("\n"))}


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
        tokens = raw["model"]["vocab"]
        if not isinstance(tokens, dict | list):
            raise TypeError(f"a vocabulary that is {tokens!r}"[:60])
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
        said |= read_json(folder / name, "tokenizer's settings") if (folder / name).is_file() else {}
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
