"""Two vocabularies side by side, by token strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graft.errors import CheckpointError


@dataclass(frozen=True)
class Overlap:
    """Numbers of tokens: in each vocabulary, and those whose string stands in both."""

    a: int
    b: int
    shared: int
    same: bool
    """The same strings at the same ids."""

    def __str__(self) -> str:
        if self.same:
            return f"the same {self.a:,} tokens"
        share = self.shared / max(min(self.a, self.b), 1)
        return f"{self.a:,} and {self.b:,} tokens, {self.shared:,} in both ({share:.0%} of the smaller)"


def overlap(a: Mapping[str, int], b: Mapping[str, int]) -> Overlap:
    """Compare two mappings of token string to id."""
    return Overlap(len(a), len(b), len(a.keys() & b.keys()), a == b)


def tokens(folder: Path) -> dict[str, int] | None:
    """Token string → id, from `tokenizer.json`; None where there is none. Raises CheckpointError for a damaged one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text())
        listed = raw["model"].get("vocab", {})
        own = listed if isinstance(listed, dict) else {entry[0]: place for place, entry in enumerate(listed)}
        return {**own, **{entry["content"]: entry["id"] for entry in raw.get("added_tokens", [])}}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: expected a tokenizer, found a damaged file ({error!r})") from None
