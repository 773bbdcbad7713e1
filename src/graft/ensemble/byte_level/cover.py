"""The token sequences that cover a text byte by byte, and what they say of its next byte. No model is needed here.

A hypothesis is a token sequence that spells the text up to some byte, and a node of the trie that spells the rest: its
next token is one behind that node. The probability that a text begins with these bytes is the sum over all hypotheses
of p(sequence) · p(next token is behind the node), and the next byte divides each among the node's branches (Vieira et
al. 2025, "From Language Models over Tokens to Language Models over Characters"; the covering is theirs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from graft.ensemble.byte_level.trie import Node, Trie

END = 256
"""Stands behind the 256 bytes: the text ends here."""


class Told:
    """What a model gives the token behind a sequence: `logs [tokens] float32` in the order of `trie`, and `root [257]
    float64`, the probabilities of its first byte and of the end. `held`: what was read behind it, which lives as long.
    """

    __slots__ = ("__weakref__", "_branches", "_running", "_steps", "held", "logs", "root", "trie", "whole")

    def __init__(self, trie: Trie, logs: np.ndarray, root: np.ndarray):
        self.trie, self.logs, self.root = trie, logs, root
        self.whole = float(root.sum())
        self.held: list[Any] = []
        self._running: dict[int, np.ndarray] = {}
        self._steps: dict[tuple[Node, int], Step | None] = {}
        self._branches: dict[Node, np.ndarray] = {}

    def log(self, token: int) -> float:
        """The log-probability of a token."""
        return self.logs.item(self.trie.place[token])

    def step(self, node: Node, byte: int) -> Step | None:
        """What one more byte makes of a token that has come to a node; None where no token goes on like that."""
        key = node, byte
        if key not in self._steps:
            after = node.next(byte)
            self._steps[key] = None if after is None else self._step(after)
        return self._steps[key]

    def _step(self, after: Node) -> Step:
        own = range(after.low, after.low + after.own)
        ended = [(self.trie.ids.item(at), self.logs.item(at)) for at in own]
        return Step(after, ended, self.behind(after) if after.high > own.stop else 0.0)

    def branches(self, node: Node) -> np.ndarray:
        """`[k] float64`: the probability of the tokens behind each of the node's next bytes."""
        found = self._branches.get(node)
        if found is None:
            found = self._branches[node] = node.sums(self.logs)
        return found

    def behind(self, node: Node) -> float:
        """The probability of all tokens that go on behind a node, those that end there left out."""
        begin, end = node.low + node.own, node.high
        if end - begin < 2:
            return math.exp(self.logs.item(begin)) if begin < end else 0.0
        if node.depth == 1:
            whole = self.root.item(node.first)
            found = whole - math.fsum(math.exp(self.logs.item(at)) for at in range(node.low, begin))
        else:
            low = node.top.low
            running = self._running.get(low)
            if running is None:
                running = self._running[low] = np.cumsum(np.exp(self.logs[low : node.top.high], dtype=np.float64))
            whole = running.item(-1)
            found = running.item(end - 1 - low) - (running.item(begin - 1 - low) if begin > low else 0.0)
        return found if found > CANCELLED * whole else float(np.exp(self.logs[begin:end], dtype=np.float64).sum())


class Step(NamedTuple):
    """`node`: where a byte leads to; `ended`: (id, log-probability) of the tokens that are complete there; `behind`:
    the probability of those that go on."""

    node: Node
    ended: list[tuple[int, float]]
    behind: float


CANCELLED = 1e-6
"""A difference of sums that is less than this share of them is summed anew: it would have lost its digits."""


class Hypothesis(NamedTuple):
    """`leaf`: the sequence; `log`: its log-probability in the state's measure, in which `mass` is the probability of
    all that goes on behind `node`. `true`: its exact log-probability, -inf where that is not known; `rough`: `told` is
    not what the model gives behind all of it."""

    leaf: Any
    told: Told
    node: Node
    log: float
    mass: float
    true: float
    rough: bool


class Born(NamedTuple):
    """A sequence that one more token has made: `leaf` before it, the token's id; `log`, `true` as of a hypothesis,
    `mass` its probability in the state's measure."""

    leaf: Any
    token: int
    log: float
    true: float
    mass: float


class State:
    """All hypotheses for a text (`open`), which have `total` mass together. `log`: the log-probability that a text
    begins with these bytes, as the states before saw it, `step`: what the last byte added to it, -inf where no sequence
    writes that one, `stuck` where it is left out. Nothing changes it once it is made."""

    __slots__ = ("log", "open", "step", "stuck", "total")

    def __init__(
        self, open_: Sequence[Hypothesis], total: float, log: float = 0.0, step: float = 0.0, stuck: bool = False
    ):
        self.open, self.total, self.log, self.step, self.stuck = open_, total, log, step, stuck

    @property
    def tree(self) -> int:
        """The row of the forest that its sequences are in."""
        return int(self.open[0].leaf.row)

    @property
    def next(self) -> np.ndarray:
        """`[257] float64`: the probability of each next byte and of the end."""
        after = np.zeros(END + 1)
        for each in self.open:
            if each.node.depth:
                after[each.node.bytes] += each.told.branches(each.node) * math.exp(each.log)
            else:
                after += each.told.root * math.exp(each.log)
        return after / after.sum()

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
    return Hypothesis(leaf, told, told.trie.root, log, told.whole * math.exp(log), true, rough)


def again(rough: Hypothesis, leaf: Any, told: Told, true: float) -> Hypothesis:
    """A rough hypothesis with what the model gives behind all of it; its mass stays as it is."""
    behind = told.behind(rough.node) if rough.node.depth else told.whole
    if not behind * math.exp(rough.log) > 0:
        return rough
    return Hypothesis(leaf, told, rough.node, math.log(rough.mass / behind), rough.mass, true, False)


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
    for leaf, told, node, log, _, true, rough in state.open:
        found = told.step(node, byte)
        if found is None:
            continue
        after, ended, behind = found
        scale = math.exp(log)
        for token, step in ended:
            mass = scale * math.exp(step)
            born.append(Born(leaf, token, log + step, -math.inf if rough else true + step, mass))
            total += mass
        if after.high > after.low + after.own:
            mass = scale * behind
            moved.append(Hypothesis(leaf, told, after, log, mass, true, rough))
            total += mass
    return Grown(moved, born, total)


FAINT = 1e-9
"""Share of the mass below which a sequence that goes on is not followed, where anything may be left out."""


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
    if drop > 0 or join > 0:
        faint = FAINT * total
        moved = [each for each in moved if each.mass > faint or each.node.depth < 2]
    ordered = [each for each in born if each.mass > 0]
    if not ordered:
        return moved, [], False
    ordered.sort(key=lambda each: each.log, reverse=True)
    given = 0.0
    while len(ordered) > 1:
        mass = ordered[-1].mass
        if given + mass > join * total and (most is None or len(ordered) <= most):
            break
        given += mass
        ordered.pop()
    first = ordered[0]
    rough = len(ordered) == 1 and given + first.mass <= drop * total
    if given:
        ordered[0] = first._replace(log=math.log(first.mass + given), mass=first.mass + given)
    return moved, ordered, rough


def step_of(state: State, mass: float) -> float:
    """The log-probability of the byte that left so much mass of a state."""
    return math.log(mass / state.total) if mass > 0 else -math.inf


LEAST = 1e-60
"""A state whose hypotheses have together less than this in their measure gets a new one."""


def state_of(hypotheses: Sequence[Hypothesis], log: float = 0.0, step: float = 0.0) -> State:
    """The state of these hypotheses; `log` (with the step) and `step` as in the state."""
    total = 0.0
    for each in hypotheses:
        total += each.mass
    if 0 < total < LEAST:
        shift = math.log(total)
        hypotheses = [each._replace(log=each.log - shift, mass=each.mass / total) for each in hypotheses]
        total = 1.0
    return State(hypotheses, total, log, step)
