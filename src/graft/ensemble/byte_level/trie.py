"""Tokens in the order of their bytes: all that begin alike stand side by side, so a node of the trie is a range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Node:
    """The tokens `low … high` begin with the same `depth` bytes; `own` of them are just these, the others go on with
    `bytes [k]`, those with the j-th beginning at `low + own + starts[j]`. `first`: the byte that all begin with, `top`:
    the node of their first two bytes, where there are as many."""

    __slots__ = ("_next", "_trie", "bytes", "depth", "first", "high", "low", "own", "starts", "top")

    def __init__(self, trie: Trie, low: int, high: int, depth: int, top: Node | None = None):
        self._trie, self.low, self.high, self.depth = trie, low, high, depth
        self.first = int(trie.letters[low, 0]) if depth else -1
        self.top = self if top is None or depth < 3 else top
        self.own = int(np.searchsorted(trie.lengths[low:high] > depth, True))
        column = trie.letters[low + self.own : high, depth] if low + self.own < high else trie.letters[:0, 0]
        self.starts = np.flatnonzero(np.concatenate(([True], column[1:] != column[:-1]))) if len(column) else _NONE
        self.bytes = column[self.starts]
        self._next: dict[int, Node] | None = None

    def next(self, byte: int) -> Node | None:
        """The node one byte on, or None where no token goes on like that."""
        if self._next is None:
            self._next = {}
        found = self._next.get(byte)
        if found is None:
            place = int(np.searchsorted(self.bytes, byte))
            if place == len(self.bytes) or self.bytes[place] != byte:
                return None
            begin = self.low + self.own
            end = self.high if place + 1 == len(self.starts) else begin + int(self.starts[place + 1])
            found = self._next[byte] = Node(self._trie, begin + int(self.starts[place]), end, self.depth + 1, self.top)
        return found

    def sums(self, logs: np.ndarray) -> np.ndarray:
        """`[k] float64`: the probability of the tokens behind each next byte; `logs` of all tokens."""
        probs = np.exp(logs[self.low + self.own : self.high], dtype=np.float64)
        return probs if len(probs) == 1 else np.add.reduceat(probs, self.starts)

    @property
    def read(self) -> bytes:
        """The bytes that lead here."""
        return self._trie.letters[self.low, : self.depth].tobytes()


_NONE = np.zeros(0, np.int64)


class Trie:
    """`ids [tokens]` in the order of their bytes, and the `place` of each; `root` is the node that all stand behind."""

    def __init__(self, spelt: Sequence[bytes | None]):
        pairs = sorted((each, i) for i, each in enumerate(spelt) if each is not None)
        self.ids = np.array([i for _, i in pairs], np.int64)
        self.place = {i: place for place, (_, i) in enumerate(pairs)}
        self.lengths = np.array([len(each) for each, _ in pairs], np.int64)
        self.letters = np.zeros((len(pairs), int(self.lengths.max(initial=0)) + 1), np.uint8)
        for place, (each, _) in enumerate(pairs):
            self.letters[place, : len(each)] = np.frombuffer(each, np.uint8)
        self.root = Node(self, 0, len(pairs), 0)

    def longest(self, text: bytes) -> tuple[int, int] | None:
        """(id, length) of the longest token that `text` begins with."""
        node: Node | None = self.root
        found = None
        for length, byte in enumerate(text, start=1):
            node = node.next(byte) if node is not None else None
            if node is None:
                break
            if node.own:
                found = int(self.ids[node.low]), length
        return found
