"""Two vocabularies side by side, by token strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
