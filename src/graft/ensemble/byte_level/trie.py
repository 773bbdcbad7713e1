"""Tokens in the order of their bytes: all that begin alike stand side by side, so a node of the trie is a range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Node:
    """The tokens `low … high` begin with the same `depth` bytes; those before `mid` are just these, the others go on
    with `bytes [k]`, those with the j-th beginning at `mid + starts[j]`; `only`: behind the root the byte, if it is but
    one. `next`: the node one byte on, None where no token goes on like that; nodes are made when they are first asked
    for. `ends`: (place, id) of those before `mid`."""

    __slots__ = ("bytes", "depth", "ends", "high", "low", "mid", "next", "only", "starts", "trie")

    def __init__(self, trie: Trie, low: int, high: int, depth: int):
        self.trie, self.low, self.high, self.depth = trie, low, high, depth
        self.mid = low + int(np.searchsorted(trie.lengths[low:high] > depth, True))
        column = trie.letters[self.mid : high, depth] if self.mid < high else trie.letters[:0, 0]
        self.starts = np.flatnonzero(np.concatenate(([True], column[1:] != column[:-1]))) if len(column) else _NONE
        self.bytes = column[self.starts]
        self.only = int(self.bytes[0]) if depth and len(self.bytes) == 1 else None
        self.ends = tuple((place, trie.ids.item(place)) for place in range(low, self.mid))
        self.next: dict[int, Node | None] = _Next(self)

    def sums(self, logs: np.ndarray) -> np.ndarray:
        """`[k] float64`: the probability of the tokens behind each next byte; `logs` of all tokens."""
        probs = np.exp(logs[self.mid : self.high], dtype=np.float64)
        return probs if len(probs) == 1 else np.add.reduceat(probs, self.starts)

    @property
    def read(self) -> bytes:
        """The bytes that lead here."""
        return self.trie.letters[self.low, : self.depth].tobytes()


class _Next(dict[int, Node | None]):
    """The nodes behind one, by the next byte."""

    __slots__ = ("node",)

    def __init__(self, node: Node):
        super().__init__()
        self.node = node

    def __missing__(self, byte: int) -> Node | None:
        node = self.node
        place = int(np.searchsorted(node.bytes, byte))
        found = None
        if place < len(node.bytes) and node.bytes[place] == byte:
            begin = node.mid + int(node.starts[place])
            end = node.high if place + 1 == len(node.starts) else node.mid + int(node.starts[place + 1])
            found = Node(node.trie, begin, end, node.depth + 1)
        self[byte] = found
        return found


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
            node = node.next[byte] if node is not None else None
            if node is None:
                break
            if node.mid > node.low:
                found = int(self.ids[node.low]), length
        return found
