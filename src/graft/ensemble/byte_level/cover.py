"""The token sequences that cover a text byte by byte, and what they say of its next byte. No model is needed here.

A hypothesis is a token sequence that spells the text up to some byte, and a node of the trie that spells the rest: its
next token is one behind that node. The probability that a text begins with these bytes is the sum over all hypotheses
of p(sequence) · p(next token is behind the node), and the next byte divides each among the node's branches (Vieira et
al. 2025, "From Language Models over Tokens to Language Models over Characters"; the covering is theirs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from graft.ensemble.byte_level.trie import Node, Trie

END = 256
"""Stands behind the 256 bytes: the text ends here."""


class Told:
    """What a model gives the token behind a sequence: `logs [tokens] float32` in the order of `trie`, and `root [257]
    float64`, the probabilities of its first byte and of the end."""

    __slots__ = ("__weakref__", "logs", "root", "trie")

    def __init__(self, trie: Trie, logs: np.ndarray, root: np.ndarray):
        self.trie, self.logs, self.root = trie, logs, root

    def log(self, token: int) -> float:
        """The log-probability of a token."""
        return float(self.logs[int(np.flatnonzero(self.trie.ids == token)[0])])


class Hypothesis(NamedTuple):
    """`leaf`: the sequence; `log`: its log-probability in the state's measure, in which are also `sums`, the
    probability of each of `node.bytes`, `end`, that of the end, and `mass`, that of all of them. `true`: its exact
    log-probability, -inf where that is not known; `rough`: `told` is not what the model gives behind all of it."""

    leaf: Any
    told: Told
    node: Node
    log: float
    sums: np.ndarray
    end: float
    mass: float
    true: float
    rough: bool


class Born(NamedTuple):
    """A sequence that one more token has made: `leaf` before it, the token's id; `log`, `true` as of a hypothesis."""

    leaf: Any
    token: int
    log: float
    true: float

    @property
    def mass(self) -> float:
        """Its probability, in the state's measure."""
        return math.exp(self.log)


@dataclass(frozen=True, slots=True)
class State:
    """All hypotheses for a text. `next [257] float64`: probability of each next byte and of the end. `log`: the sum of
    the logs of what the states before gave the bytes of the text. `stuck`: no sequence wrote the byte before."""

    open: tuple[Hypothesis, ...]
    next: np.ndarray
    log: float = 0.0
    stuck: bool = False

    @property
    def lost(self) -> float:
        """The exact log-probability that a text begins with these bytes is at least `log` less this."""
        known = [each for each in self.open if not each.rough and each.mass > 0 and each.true > -math.inf]
        parts = [each.true - each.log + math.log(each.mass) for each in known]
        if not parts:
            return math.inf
        top = max(parts)
        return self.log - top - math.log(math.fsum(math.exp(part - top) for part in parts))


def fresh(leaf: Any, told: Told, log: float, true: float, rough: bool = False) -> Hypothesis:
    """The hypothesis of a sequence that spells the whole text."""
    scale = math.exp(log)
    sums, end = told.root[told.trie.root.bytes] * scale, float(told.root[END]) * scale
    return Hypothesis(leaf, told, told.trie.root, log, sums, end, float(sums.sum()) + end, true, rough)


def again(rough: Hypothesis, leaf: Any, told: Told, true: float) -> Hypothesis:
    """A rough hypothesis with what the model gives behind all of it; its mass stays as it is."""
    sums = rough.node.sums(told.logs, rough.log)
    end = float(told.root[END]) * math.exp(rough.log) if rough.node.depth == 0 else 0.0
    mass = float(sums.sum()) + end
    if not mass > 0:
        return rough
    part = rough.mass / mass
    log = rough.log + math.log(part)
    return Hypothesis(leaf, told, rough.node, log, sums * part, end * part, rough.mass, true, False)


def grown(state: State, byte: int) -> tuple[list[Hypothesis], list[Born]]:
    """What one more byte leaves of a state: sequences whose next token goes on, and those that it completes."""
    moved: list[Hypothesis] = []
    born: list[Born] = []
    for each in state.open:
        node = each.node.next(byte)
        if node is None:
            continue
        logs = each.told.logs
        for at in range(node.low, node.low + node.own):
            step = float(logs[at])
            true = -math.inf if each.rough else each.true + step
            born.append(Born(each.leaf, int(each.told.trie.ids[at]), each.log + step, true))
        if len(node.starts):
            sums = node.sums(logs, each.log)
            mass = float(sums.sum())
            moved.append(Hypothesis(each.leaf, each.told, node, each.log, sums, 0.0, mass, each.true, each.rough))
    return moved, born


FAINT = 1e-9
"""Share of the mass below which a sequence that goes on is not followed, where anything may be left out."""


def chosen(
    moved: Sequence[Hypothesis], born: Sequence[Born], drop: float, join: float, most: int | None
) -> tuple[list[Hypothesis], list[Born], bool]:
    """What is followed: hypotheses that go on, complete sequences, and whether the only one of these is rough.

    Complete sequences spell the same bytes. The least likely ones, which hold at most the share `join` of all mass
    together, and all behind the `most` likeliest, give their mass to the likeliest: it is assumed that they go on as it
    does. Where all of them hold at most the share `drop`, the model is not asked what comes behind any.
    """
    total = sum(each.mass for each in moved) + sum(each.mass for each in born)
    if not total > 0:
        return [], [], False
    if drop > 0 or join > 0:
        moved = [each for each in moved if each.mass > FAINT * total or each.node.depth < 2]
    ordered = sorted((each for each in born if each.mass > 0), key=lambda each: each.log, reverse=True)
    given = 0.0
    while len(ordered) > 1:
        mass = ordered[-1].mass
        if given + mass > join * total and (most is None or len(ordered) <= most):
            break
        given += mass
        ordered.pop()
    if not ordered:
        return list(moved), [], False
    first = ordered[0]
    rough = len(ordered) == 1 and given + first.mass <= drop * total
    if given:
        ordered[0] = first._replace(log=math.log(first.mass + given))
    return list(moved), ordered, rough


LEAST = 1e-60
"""A state whose hypotheses have together less than this in their measure gets a new one."""


def state_of(hypotheses: Sequence[Hypothesis], log: float = 0.0) -> State:
    """The state of these hypotheses; `log` as in the state."""
    after = np.zeros(END + 1)
    for each in hypotheses:
        after[each.node.bytes] += each.sums
        after[END] += each.end
    total = float(after.sum())
    if total < LEAST:
        shift = math.log(total)
        hypotheses = [
            each._replace(log=each.log - shift, sums=each.sums / total, end=each.end / total, mass=each.mass / total)
            for each in hypotheses
        ]
    return State(tuple(hypotheses), after / total, log)
