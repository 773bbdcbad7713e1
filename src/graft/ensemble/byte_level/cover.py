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


class Hypothesis(NamedTuple):
    """`leaf`: the sequence; `log`: its log-probability in the state's measure, in which are also `sums`, the
    probability of each of `node.bytes`, `end`, that of the end, and `mass`, that of all of them."""

    leaf: Any
    told: Told
    node: Node
    log: float
    sums: np.ndarray
    end: float
    mass: float


class Born(NamedTuple):
    """A sequence that one more token has made: `leaf` before it, the token's id, and `log` as of a hypothesis."""

    leaf: Any
    token: int
    log: float


@dataclass(frozen=True, slots=True)
class State:
    """All hypotheses for a text. `next [257] float64`: probability of each next byte and of the end.

    `lost`: nats for what was dropped on the way. The exact log-probability that a text begins with these bytes is at
    least the sum of the logs of what `next` gave them less `lost`.
    """

    open: tuple[Hypothesis, ...]
    next: np.ndarray
    lost: float = 0.0


def fresh(leaf: Any, told: Told, log: float) -> Hypothesis:
    """The hypothesis of a sequence that spells the whole text."""
    scale = math.exp(log)
    sums, end = told.root[told.trie.root.bytes] * scale, float(told.root[END]) * scale
    return Hypothesis(leaf, told, told.trie.root, log, sums, end, float(sums.sum()) + end)


def grown(state: State, byte: int) -> tuple[list[Hypothesis], list[Born]]:
    """What one more byte leaves of a state: sequences whose next token goes on, and those that it completes."""
    moved: list[Hypothesis] = []
    born: list[Born] = []
    for each in state.open:
        node = each.node.next(byte)
        if node is None:
            continue
        logs = each.told.logs
        own = range(node.low, node.low + node.own)
        born += [Born(each.leaf, int(each.told.trie.ids[at]), each.log + float(logs[at])) for at in own]
        if len(node.starts):
            sums = node.sums(logs, each.log)
            moved.append(Hypothesis(each.leaf, each.told, node, each.log, sums, 0.0, float(sums.sum())))
    return moved, born


def pruned(
    moved: Sequence[Hypothesis], born: Sequence[Born], drop: float, most: int | None
) -> tuple[list[Hypothesis], list[Born], float]:
    """The likeliest hypotheses, and the share of the mass that goes with the others.

    As many of the least likely as hold at most the share `drop` together are left out, and all behind the `most`
    likeliest; those of probability zero always.
    """
    masses = [each.mass for each in moved] + [math.exp(each.log) for each in born]
    total = sum(masses)
    if not total > 0:
        return [], [], 0.0
    order = sorted(range(len(masses)), key=masses.__getitem__)
    gone, left = 0.0, len(masses)
    for place in order[:-1]:
        if masses[place] > 0 and gone + masses[place] > drop * total and (most is None or left <= most):
            break
        gone += masses[place]
        left -= 1
    if left == len(masses):
        return list(moved), list(born), 0.0
    kept, size = set(order[-left:]), len(moved)
    return (
        [each for place, each in enumerate(moved) if place in kept],
        [each for place, each in enumerate(born) if place + size in kept],
        gone / total,
    )


LEAST = 1e-60
"""A state whose hypotheses have together less than this in their measure gets a new one."""


def state_of(hypotheses: Sequence[Hypothesis], lost: float = 0.0) -> State:
    """The state of these hypotheses."""
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
    return State(tuple(hypotheses), after / total, lost)
