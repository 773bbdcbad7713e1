"""Tokens in a tree of sequences: each stands behind the one before it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from graft.ensemble.byte_level.cover import Told
from graft.ensemble.byte_level.trie import Trie

SPARE = 24
"""Tokens of padding for which rows of different length are still read in one pass."""
UNREAD = np.zeros(0, np.int64)
"""Columns of a token that was not read."""
FORGOTTEN: weakref.ref[Told] = weakref.ref(Told(Trie([b"a"]), np.zeros(1, np.float32), np.zeros(2), 0.0))
"""What the model gave behind a token that was read, where nobody holds it."""


class Leaf:
    """A token behind its `parent`, `depth` tokens from the start, in tree `row`; `slots`: columns of the tree that it
    sees, its own the last. `told`: what the model gives behind it, as long as somebody holds that; `true`: of one that
    is followed before it is read, the log-probability of the sequence, where that is known. `again`: the same, read
    with fewer tokens before it, where the model can read no further. `twin`: of one that was not read, what it is when
    it has been; `sought`: the pass of the forest after which that was looked for last.
    """

    __slots__ = ("__weakref__", "again", "depth", "parent", "row", "slots", "sought", "token", "told", "true", "twin")

    def __init__(self, parent: Leaf | None, token: int, row: int = 0):
        self.parent, self.token, self.slots = parent, token, UNREAD
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.row: int = row if parent is None else parent.row
        self.told: weakref.ref[Told] | None = None
        self.again: Leaf | None = None
        self.true = -np.inf if parent is not None else 0.0
        self.twin: tuple[Leaf, Told] | None = None
        self.sought = -1

    @property
    def read(self) -> bool:
        """Whether the model has read it."""
        return self.told is not None

    @property
    def now(self) -> Leaf:
        """The leaf, or its twin."""
        return self if self.twin is None else self.twin[0]

    def path(self, most: int | None = None) -> list[int]:
        """The tokens from the start (which is left out) to this one, or the last so many."""
        tokens: list[int] = []
        leaf = self
        while leaf.parent is not None and (most is None or len(tokens) < most):
            tokens.append(leaf.token)
            leaf = leaf.parent
        return tokens[::-1]


def alike(trees: Sequence[list[Leaf]]) -> list[list[list[Leaf]]]:
    """Lists of leaves, the longest first, in groups whose lists are about as long."""
    groups: list[list[list[Leaf]]] = []
    spare = 0
    for own in trees:
        spare += len(groups[-1][0]) - len(own) if groups else SPARE + 1
        if spare > SPARE:
            groups.append([])
            spare = 0
        groups[-1].append(own)
    return groups
