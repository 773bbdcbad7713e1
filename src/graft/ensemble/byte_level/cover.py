"""The token sequences that cover a text byte by byte, and what they say of its next byte. No model is needed here.

A hypothesis is a token sequence that spells the text up to some byte, and a node of the trie that spells the rest: its
next token is one behind that node. The probability that a text begins with these bytes is the sum over all hypotheses
of p(sequence) · p(next token is behind the node), and the next byte divides each among the node's branches (Vieira et
al. 2025, "From Language Models over Tokens to Language Models over Characters"; the covering is theirs). The tokens
behind a node stand side by side, so that their probability is a difference of two running totals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from graft.ensemble.byte_level._shares import FAINT, LEAST
from graft.ensemble.byte_level.trie import Node, Trie

END = 256
"""Stands behind the 256 bytes: the text ends here."""
CANCELLED = 1e-8
"""A difference of running totals that is less than this is summed anew: it would have lost its digits."""


class Told:
    """What a model gives the token behind a sequence: `logs [tokens] float32` in the order of `trie`, `totals
    [tokens + 1] float64`, the probability of the tokens before each, and `end`, that of the end. `held`: what was read
    behind it, which lives as long."""

    __slots__ = ("__weakref__", "_root", "end", "held", "log_at", "logs", "total_at", "trie", "whole")

    def __init__(self, trie: Trie, logs: np.ndarray, totals: np.ndarray, end: float):
        self.trie, self.logs, self.end = trie, logs, end
        # numbers by their place, without what arrays cost
        self.log_at, self.total_at = _numbers(logs), _numbers(totals)
        self.whole = self.total_at[-1] + end
        self.held: list[Any] = []
        self._root: np.ndarray | None = None

    def log(self, token: int) -> float:
        """The log-probability of a token."""
        return self.log_at[self.trie.place[token]]

    @property
    def root(self) -> np.ndarray:
        """`[257] float64`: the probabilities of the first byte and of the end."""
        if self._root is None:
            self._root = np.zeros(END + 1)
            first = self.trie.root
            if len(first.bytes):
                self._root[first.bytes] = first.sums(self.logs)
            self._root[END] = self.end
        return self._root

    def behind(self, node: Node) -> float:
        """The probability of all tokens that go on behind a node, those that end there left out."""
        found = self.total_at[node.high] - self.total_at[node.mid]
        return found if found > CANCELLED else float(np.exp(self.logs[node.mid : node.high], dtype=np.float64).sum())


def _numbers(values: Any) -> Any:
    return memoryview(values)


class Hypothesis(NamedTuple):
    """`leaf`: the sequence; `scale`: its probability in the state's measure, in which `mass` is the probability of
    all that goes on behind `node`. `true`: its exact log-probability, -inf where that is not known; `rough`: `told` is
    not what the model gives behind all of it."""

    leaf: Any
    told: Told
    node: Node
    scale: float
    mass: float
    true: float
    rough: bool


class Born(NamedTuple):
    """A sequence that one more token has made: `leaf` before it, the token's id; `true` as of a hypothesis, `mass` its
    probability in the state's measure."""

    leaf: Any
    token: int
    true: float
    mass: float


class State:
    """All hypotheses for a text (`open`), which have `total` mass together. `log`: the log-probability that a text
    begins with these bytes, as the states before saw it, `step`: what the last byte added to it, -inf where no sequence
    writes that one, `stuck` where it is left out. Nothing of this changes once it is made; `later`: the states one byte
    on that are known."""

    __slots__ = ("_next", "later", "log", "open", "step", "stuck", "total")

    def __init__(
        self, open_: Sequence[Hypothesis], total: float, log: float = 0.0, step: float = 0.0, stuck: bool = False
    ):
        self.open, self.total, self.log, self.step, self.stuck = open_, total, log, step, stuck
        self.later: dict[int, State] = {}
        self._next: np.ndarray | None = None

    @property
    def tree(self) -> int:
        """The row of the forest that its sequences are in."""
        return int(self.open[0].leaf.row)

    @property
    def next(self) -> np.ndarray:
        """`[257] float64`: the probability of each next byte and of the end."""
        if self._next is None:
            self._next = self._spread()
        return self._next

    def _spread(self) -> np.ndarray:
        after = np.zeros(END + 1)
        for _, told, node, scale, mass, _, _ in self.open:
            if node.only is not None:
                after[node.only] += mass
            elif node.depth:
                after[node.bytes] += node.sums(told.logs) * scale
            else:
                after += told.root * scale
        after /= np.add.reduce(after)
        return after

    @property
    def lost(self) -> float:
        """The exact log-probability that a text begins with these bytes is at least `log` less this."""
        known = [each for each in self.open if not each.rough and each.mass > 0 and each.true > -math.inf]
        parts = [each.true + math.log(each.mass / each.scale) for each in known]
        if not parts:
            return math.inf
        top = max(parts)
        return self.log - top - math.log(math.fsum(math.exp(part - top) for part in parts))


def fresh(leaf: Any, told: Told, scale: float, true: float, rough: bool = False) -> Hypothesis:
    """The hypothesis of a sequence that spells the whole text."""
    return _made(Hypothesis, (leaf, told, told.trie.root, scale, told.whole * scale, true, rough))


_made = tuple.__new__
"""Makes a named tuple of its values, in half the time."""
_exp = math.exp


def again(rough: Hypothesis, leaf: Any, told: Told, true: float) -> Hypothesis:
    """A rough hypothesis with what the model gives behind all of it; its mass stays as it is."""
    behind = told.behind(rough.node) if rough.node.depth else told.whole
    return Hypothesis(leaf, told, rough.node, rough.mass / behind, rough.mass, true, False) if behind > 0 else rough


class Grown(NamedTuple):
    """What one more byte leaves of a state: sequences whose next token goes on (`moved`), those that it completes
    (`born`), and the `mass` of both."""

    moved: list[Hypothesis]
    born: list[Born]
    mass: float


def grown(state: State, byte: int) -> Grown:
    """What one more byte leaves of a state."""
    moved: list[Hypothesis] = []
    born: list[Born] = []
    total = 0.0
    for leaf, told, node, scale, _, true, rough in state.open:
        after = node.next[byte]
        if after is None:
            continue
        for place, token in after.ends:
            step = told.log_at[place]
            mass = scale * _exp(step)
            born.append(_made(Born, (leaf, token, -math.inf if rough else true + step, mass)))
            total += mass
        mid, high = after.mid, after.high
        if mid < high:
            behind = told.total_at[high] - told.total_at[mid]
            mass = scale * (behind if behind > CANCELLED else told.behind(after))
            moved.append(_made(Hypothesis, (leaf, told, after, scale, mass, true, rough)))
            total += mass
    return _made(Grown, (moved, born, total))


def chosen(
    moved: list[Hypothesis], born: Sequence[Born], total: float, drop: float, join: float, most: int | None
) -> tuple[list[Hypothesis], list[Born], bool]:
    """What is followed: hypotheses that go on, complete sequences, and whether the only one of these is rough.

    Complete sequences spell the same bytes. The least likely ones, which hold at most the share `join` of the mass of
    all (`total`) together, and all behind the `most` likeliest, give theirs to the likeliest: it is assumed that they
    go on as it does. Where all of them hold at most the share `drop`, the model is not asked what comes behind any.
    """
    if not total > 0:
        return [], [], False
    ordered = [each for each in born if each[3] > 0]
    if not ordered:
        return moved, [], False
    if drop > 0 or join > 0:
        faint = FAINT * total
        moved = [each for each in moved if each[4] > faint]
    given = 0.0
    if len(ordered) > 1:
        ordered.sort(key=_mass, reverse=True)
        while len(ordered) > 1:
            mass = ordered[-1].mass
            if given + mass > join * total and (most is None or len(ordered) <= most):
                break
            given += mass
            ordered.pop()
    leaf, token, true, mass = ordered[0]
    rough = len(ordered) == 1 and given + mass <= drop * total
    if given:
        ordered[0] = _made(Born, (leaf, token, true, mass + given))
    return moved, ordered, rough


_mass = itemgetter(3)


def step_of(state: State, mass: float) -> float:
    """The log-probability of the byte that left so much mass of a state."""
    return math.log(mass / state.total) if mass > 0 else -math.inf


def state_of(hypotheses: Sequence[Hypothesis], log: float = 0.0, step: float = 0.0) -> State:
    """The state of these hypotheses; `log` (with the step) and `step` as in the state."""
    total = sum([each[4] for each in hypotheses])
    if 0 < total < LEAST:
        hypotheses = [each._replace(scale=each.scale / total, mass=each.mass / total) for each in hypotheses]
        total = 1.0
    return State(hypotheses, total, log, step)
