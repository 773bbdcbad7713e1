"""The states behind long prompts: they are gone through as known texts are, by compiled functions, and what is followed
at their ends is taken over into a forest, with the keys and values of all that leads there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graft.ensemble.byte_level import _layout as at
from graft.ensemble.byte_level.arrays import address
from graft.ensemble.byte_level.byte_model import ByteModel
from graft.ensemble.byte_level.cover import Hypothesis, State, Told
from graft.ensemble.byte_level.forest import Forest
from graft.ensemble.byte_level.known import Known, serves
from graft.ensemble.byte_level.leaf import Leaf
from graft.ensemble.byte_level.walking import Walk

LONG = 64
"""Bytes of a prompt from which on this is quicker than to make a state behind each of them."""
TOGETHER = 16
"""Prompts that are read at the same time."""


def reached(model: ByteModel, forest: Forest, texts: Sequence[bytes]) -> list[State | None]:
    """The state behind each text less its last byte, in a new tree; None where the text must be followed otherwise.

    That is where it is short, where known texts are not served (`known.serves`), where a byte cannot be written, and
    where the model cannot read all of it.
    """
    states: list[State | None] = [None] * len(texts)
    long = [number for number, text in enumerate(texts) if len(text) >= LONG]
    if not long or not serves(model):
        return states
    for begin in range(0, len(long), TOGETHER):
        part = long[begin : begin + TOGETHER]
        known = Known(model, [texts[number] for number in part])
        known.run()
        ends = [_End(model, walk) for walk in known.walks]
        taken = [place for place, end in enumerate(ends) if end.whole]
        found = _taken(forest, known, taken, [ends[place] for place in taken])
        for place, state in zip(taken, found, strict=True):
            states[part[place]] = state
    return states


class _End:
    """What a walk follows at its end: `nodes` of hypotheses, of which some are `rough`. Of these and of nodes that lead
    there some are `unread`; of those that were read, `tips` are read once more, the others are `inner`, each after the
    ones before it. `whole`: whether this can be taken over."""

    def __init__(self, model: ByteModel, walk: Walk):
        self.model, self.walk, self.table = model, walk, walk.nodes
        count = int(walk.counts[0])
        self.nodes = walk.open[0, at.H_NODE, :count].tolist()
        self.rough = walk.open[0, at.H_ROUGH, :count].tolist()
        told = {node for node, rough in zip(self.nodes, self.rough, strict=True) if not rough}
        path = {node for each in self.nodes for node in (each, *self._above(each))}
        leading = {node for node in path if self._column(node) >= 0}
        self.unread = sorted(path - leading, key=self._place)
        told |= {self._parent(node) for node in self.unread} & leading  # so that it is known how likely these are
        # what stands behind one that is read once more cannot be there before it
        self.tips = {node for node in leading if node in told or not told.isdisjoint(self._above(node))}
        self.inner = sorted(leading - self.tips, key=self._place)
        self.told: dict[int, Told] = {}
        self.whole = not walk.failed and self._known()

    def _known(self) -> bool:
        limit, guess = self.model.reader.limit, self.model.reader.guess
        depths = [1 + sum(1 for _ in self._above(node)) for node in self.nodes]
        moved = any(self.table[at.TREE, node] for node in self.inner)
        guessed = [node for node, rough in zip(self.nodes, self.rough, strict=True) if rough]
        return (
            not moved
            and (limit is None or max(depths) + 1 < limit)
            and 0 not in self.nodes
            and all(guess(self.token(node)) is not None for node in guessed)
        )

    def _above(self, node: int) -> list[int]:
        """The nodes before one, without the start."""
        found = []
        while (node := self._parent(node)) > 0:
            found.append(node)
        return found

    def _parent(self, node: int) -> int:
        return int(self.table[at.PARENT, node])

    def _column(self, node: int) -> int:
        return int(self.table[at.COLUMN, node])

    def _place(self, node: int) -> int:
        return len(self._above(node))

    def token(self, node: int) -> int:
        """The last token of a node."""
        return int(self.table[at.TOKEN, node])

    @property
    def columns(self) -> np.ndarray:
        """Where the keys and values of `inner` are."""
        found: np.ndarray = self.table[at.COLUMN, self.inner]
        return found

    def leaves(self, root: Leaf) -> dict[int, Leaf]:
        """A leaf for each node that leads to what is followed, and of that."""
        made = {0: root}
        for node in sorted({each for own in self.nodes for each in (own, *self._above(own))}, key=self._place):
            made[node] = Leaf(made[self._parent(node)], self.token(node))
        return made

    def state(self, leaves: dict[int, Leaf]) -> State:
        """The state, of leaves that were read."""
        walk, open_ = self.walk, []
        flags = np.zeros(len(walk.trues), np.int64)
        flags[list(self.told)] = 1
        walk.kernels["needed"](walk.pointer, address(flags))  # which finds out how likely what was read is
        for node in self.unread:
            above = self._parent(node)
            if above in self.told:
                leaves[node].true = float(walk.trues[above]) + self.told[above].log(self.token(node))
        for place, (node, rough) in enumerate(zip(self.nodes, self.rough, strict=True)):
            leaf = leaves[node]
            told = self.model.reader.guess(leaf.token) if rough else self.told[node]
            assert told is not None
            scale, mass, true = walk.weights[0, :, place].tolist()
            step = told.trie.root
            for byte in walk.data[int(self.table[at.END, node]) : -1]:
                after = step.next[byte]
                assert after is not None
                step = after
            open_.append(Hypothesis(leaf, told, step, scale, mass, true, bool(rough)))
        return State(open_, float(walk.reals[at.TOTAL]), float(walk.reals[at.LOG]))


@torch.inference_mode()
def _taken(forest: Forest, known: Known, numbers: Sequence[int], ends: Sequence[_End]) -> list[State]:
    """States in new trees: what leads to the ends is copied, what stands there is read once more, all in one pass."""
    if not ends:
        return []
    rows = forest.plant(len(ends))
    made = [end.leaves(forest.root(row)[0]) for end, row in zip(ends, rows, strict=True)]
    for number, end, leaves, row in zip(numbers, ends, made, rows, strict=True):
        end.told[0] = forest.root(row)[1]
        if end.inner:
            forest.adopt([leaves[node] for node in end.inner], known.rows.cache, number, end.columns)
    tips = [
        [(node, leaves[node]) for node in leaves if node in end.tips] for end, leaves in zip(ends, made, strict=True)
    ]
    found = {id(leaf): told for leaf, told in forest.tell([leaf for own in tips for _, leaf in own])}
    for end, own in zip(ends, tips, strict=True):
        end.told |= {node: found[id(leaf)] for node, leaf in own}
    return [end.state(leaves) for end, leaves in zip(ends, made, strict=True)]
