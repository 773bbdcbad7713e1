"""One known text on its way through the compiled functions: what it wants read, and what it makes of that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from graft.ensemble.byte_level import _layout as at
from graft.ensemble.byte_level.arrays import Arrays, address
from graft.ensemble.byte_level.cover import Told
from graft.ensemble.byte_level.following import cut
from graft.ensemble.byte_level.reader import KEPT, Reader
from graft.ensemble.byte_level.trie import Trie

if TYPE_CHECKING:
    from graft.ensemble.byte_level.byte_model import ByteModel

SIDES = 1024
"""Sequences beside the leading one that are looked for at once."""
PREDICTED = 6
"""Bytes a token by which it is seen ahead which sequence will lead."""
ROWS = 1024
"""Tokens of which it must be possible to keep what comes behind them, where that is asked of all that are not read."""
SLICE = 1 << 16
"""Bytes that are cut into tokens at once."""
STRETCH = 1 << 14
"""Bytes of a text whose ranges of tokens are known at a time."""
DEAD = 300
"""Columns that are added to a text's trees until it is looked through for those that nothing follows any more."""
ROOTS = 3
"""Nodes that are nothing but the start: of the text, and of each tree for what is read again."""
TREES = 2
"""A text's trees: where the model can read no further, it goes on from what is read again in the other one."""


class Tries:
    """What a reader's tries are to the compiled functions, and where what comes behind single tokens lies."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.held: list[np.ndarray] = []
        self.later, self.first = self._trie(reader.later), self._trie(reader.first)
        size = len(reader.spelling.later)
        self.logs, self.totals = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.lengths = [
            np.array([len(each or b"") for each in spelt]) for spelt in (reader.spelling.later, reader.spelling.first)
        ]
        self.known: dict[int, Told] = {}
        self.learn()

    def _trie(self, trie: Trie) -> np.ndarray:
        letters = np.ascontiguousarray(trie.letters)
        arrays: list[np.ndarray] = [letters, trie.lengths, trie.ids]
        numbers = [*(address(each) for each in arrays), len(trie.ids), letters.shape[1]]
        self.held += [*arrays, np.array(numbers, np.int64)]
        return self.held[-1]

    def learn(self) -> None:
        """Take over what the reader knows behind single tokens."""
        found = self.reader.guesses
        if not self.known.keys() <= found.keys():
            self.known.clear()
            self.logs[:] = self.totals[:] = 0
        for token, told in found.items():
            if token not in self.known:
                self.known[token] = told
                self.logs[token], self.totals[token] = address(told.logs), address(np.asarray(told.total_at))


class Walk(Arrays):
    """A text on its way through the compiled functions. `gold [bytes]`: the log-probabilities found so far."""

    def __init__(self, model: ByteModel, tries: Tries, data: bytes, told: Told):
        super().__init__()
        self.model, self.data, self.tries = model, data, tries
        size = len(data)
        self.failed = False
        self.gold = self._hold(at.GOLD, np.empty(size))
        self.reals = self._hold(at.REALS, np.zeros(at.REAL))
        self._hold(at.DATA, np.frombuffer(data + b"\0", np.uint8))
        self.counts = self._hold(at.COUNTS, np.zeros(at.BUFFERS, np.int64))
        self.columns = self._hold(at.COLUMNS, np.ones(TREES, np.int64))
        self._hold(at.LATER, tries.later)
        self._hold(at.FIRST, tries.first)
        self._hold(at.LOGS, tries.logs)
        self._hold(at.TOTALS, tries.totals)
        self._hold(at.SEEN, np.zeros(len(tries.logs), np.int64))
        self._hold(at.ALONE, np.zeros(len(tries.logs), np.int64))
        cover = model.cover
        self.reals[[at.DROP, at.JOIN]] = cover.drop, cover.join
        limit, tokens = model.reader.limit, len(model.reader.later.ids)
        for place, value in (
            (at.SIZE, size),
            (at.SPAN, min(size + 1, STRETCH)),
            (at.SIDES, SIDES),
            (at.MOST, -1 if cover.most is None else cover.most),
            (at.LIMIT, -1 if limit is None else limit),
            (at.EVERY, ROWS * tokens <= KEPT),
        ):
            self.frame[place] = value
        self.columns_kept = TREES
        some = min(size, STRETCH // 4)
        self._nodes(256 + some)
        self._pool(4096 + 16 * some)
        self._open(64)
        self._born(64)
        self._asks(2 * SIDES)
        self._entries(1024 + 8 * min(size, STRETCH))
        self._plant(told)
        self.cuts = self._hold(at.CUTS, np.full(size + 1, -1, np.int64))
        self._hold(at.ENDING, np.full(size + 1, -1, np.int64))
        self._cut()

    def _plant(self, told: Told) -> None:
        """The start, of the text and of each tree; tokens of no bytes behind it are asked for."""
        nodes = self.nodes
        nodes[at.TOKEN, :ROOTS], nodes[at.END, :ROOTS] = self.model.reader.start, 0
        nodes[at.DEPTH, :ROOTS] = nodes[at.COLUMN, :ROOTS] = 0
        nodes[at.TREE, :ROOTS], nodes[at.ASKED, :ROOTS] = (0, 1, 0), at.SILENT
        self.trues[:ROOTS] = 0
        self.frame[at.NODE_COUNT] = ROOTS
        self._call("begin", address(told.logs), address(np.asarray(told.total_at)))
        root = told.trie.root
        self.empty = []
        for place in range(root.low, root.mid):
            node = self._child(told.trie.ids.item(place))
            self.empty.append(node)
            self.trues[node] = told.log_at[place]
        self.asks[: len(self.empty)] = self.empty
        self.frame[at.ASK_COUNT] = len(self.empty)
        self._begin(told)

    def _child(self, token: int) -> int:
        """A node behind the start that ends where it does."""
        node = int(self.frame[at.NODE_COUNT])
        self.nodes[:, node] = -1
        self.nodes[[at.PARENT, at.TOKEN, at.END, at.SIBLING], node] = 0, token, 0, self.nodes[at.CHILD, 0]
        self.nodes[at.CHILD, 0] = node
        self.frame[at.NODE_COUNT] += 1
        return node

    def _begin(self, told: Told) -> None:
        """The state before the first byte."""
        for place, node in enumerate([0, *self.empty]):
            mass = math.exp(self.trues[node])
            self.open[0, :, place] = node, self.nodes[at.ROW, node], 0, 0
            self.weights[0, :, place] = mass, mass, self.trues[node]
        self.counts[0] = 1 + len(self.empty)
        self.reals[at.TOTAL] = self.weights[0, at.H_MASS, : self.counts[0]].sum()

    @property
    def done(self) -> bool:
        """Whether nothing more is to be known."""
        return self.failed or (int(self.frame[at.DONE]) >= len(self.data) and not self.empty)

    @property
    def rest(self) -> int:
        """Bytes that are not sure yet."""
        return len(self.data) - int(self.frame[at.DONE])

    def wanted(self, ahead: int) -> np.ndarray:
        """The nodes that are to be read, in order, all with their columns; of the likeliest sequence so many tokens
        behind what is sure."""
        self.frame[at.LIST_COUNT] = 0
        self._call("listed", ahead)
        return self.arrays[at.LIST][: int(self.frame[at.LIST_COUNT])].copy()

    def _cut(self) -> None:
        """Where the tokenizer cuts the text."""
        begin, size = 0, len(self.data)
        while begin < size:
            tokens = cut(self.model, self.data[begin : begin + SLICE], begin == 0)
            if begin + SLICE < size:
                tokens = tokens[:-1]
            if not tokens:
                break
            lengths = self.tries.lengths[0][tokens]
            if begin == 0:
                lengths[0] = self.tries.lengths[1][tokens[0]]
            ends = begin + np.cumsum(lengths)
            self.cuts[ends - lengths] = tokens
            begin = int(ends[-1])

    def alone(self) -> np.ndarray:
        """Tokens of which is to be known what comes behind them alone."""
        return self.arrays[at.ALONE][: int(self.frame[at.ALONE_COUNT])]

    def told(self, nodes: np.ndarray, logits: torch.Tensor, probs: torch.Tensor, norms: torch.Tensor) -> None:
        """What the model gives behind nodes, `[nodes, vocabulary] float32`."""
        todo = np.ascontiguousarray(nodes)
        while (
            status := self.kernels["reduced"](
                self.pointer,
                address(todo),
                len(todo),
                logits.data_ptr(),
                probs.data_ptr(),
                norms.data_ptr(),
                logits.shape[1],
            )
        ) != at.DONE_ALL:
            self._more(status)

    def go_on(self, ahead: int) -> None:
        """Walk on with what was read."""
        if self.empty:
            self._begin_again()
        frame = self.frame
        if int(frame[at.DONE]) >= len(self.data):
            return
        known = int(frame[at.BASE] + frame[at.SPAN]) - 1
        frame[at.PREDICTED] = min(known, len(self.data), max(frame[at.STOP], frame[at.DONE]) + PREDICTED * ahead)
        while True:
            frame[at.WALK] += 1
            status = self.kernels["walk"](self.pointer)
            if status == at.DONE_ALL:
                return
            if status == at.STUCK:
                self.failed = True
                return
            self._more(status)

    def forget(self) -> list[np.ndarray] | None:
        """Leave out nodes that nothing follows any more, where there are many; returns the columns of each tree that
        stay, in order."""
        if self.columns.sum() < self.columns_kept + DEAD and not self._far():
            return None
        count, done, nodes = int(self.frame[at.NODE_COUNT]), int(self.frame[at.DONE]), self.nodes
        followed = self.open[0, at.H_NODE, : self.counts[0]]
        rough = self.open[0, at.H_ROUGH, : self.counts[0]] > 0
        flags = ((nodes[at.END, :count] > done) & (nodes[at.ROW, :count] >= 0)).astype(np.int64)
        flags[:ROOTS] = flags[followed] = 1
        self.kernels["needed"](self.pointer, address(flags))
        keep = np.flatnonzero(flags)
        numbers = np.full(count + 1, -1, np.int64)
        numbers[keep] = np.arange(len(keep))
        pool = np.empty(int(self.frame[at.POOL_USED]))
        used = self.kernels["moved_rows"](self.pointer, address(numbers), address(pool))
        self.arrays[at.POOL][:used] = pool[:used]
        self.frame[at.POOL_USED] = used
        self._renumber(keep, numbers)
        self.open[0, at.H_NODE, : self.counts[0]] = followed = numbers[followed]
        rows = np.where(rough, nodes[at.ROUGH, followed], nodes[at.ROW, followed])
        self.open[0, at.H_ROW, : self.counts[0]] = rows
        return self._columns_kept(len(keep))

    def _far(self) -> bool:
        """Whether the ranges that are known end soon."""
        end = int(self.frame[at.BASE] + self.frame[at.SPAN])
        return end <= len(self.data) and int(self.frame[at.DONE]) + STRETCH // 4 > end

    def _renumber(self, keep: np.ndarray, numbers: np.ndarray) -> None:
        """Only these nodes, in order, which are known by other numbers from now on."""
        nodes, left = self.nodes, len(keep)
        own = nodes[:, keep]
        for field in (at.PARENT, at.ABOVE, at.AGAIN):
            own[field] = numbers[own[field]]  # the last one is -1, as what is not kept
        own[[at.CHILD, at.SIBLING, at.BESIDE, at.PRIOR, at.CUTTING]] = -1
        self.arrays[at.ENDING][:] = -1
        nodes[:, :left] = own
        for place in (at.TRUES, at.SHARES):
            self.arrays[place][:left] = self.arrays[place][keep]
        self.frame[at.NODE_COUNT] = left
        self.kernels["linked"](self.pointer, ROOTS)

    def _columns_kept(self, count: int) -> list[np.ndarray]:
        nodes, kept = self.nodes[:, :count], []
        for tree in range(TREES):
            mine = np.flatnonzero((nodes[at.TREE] == tree) & (nodes[at.COLUMN] >= 0))
            columns, place = np.unique(nodes[at.COLUMN, mine], return_inverse=True)
            nodes[at.COLUMN, mine] = place
            self.columns[tree] = len(columns)
            kept.append(columns)
        self.columns_kept = int(self.columns.sum())
        if self._far():
            later = nodes[at.END, ROOTS:]
            base = int(min(self.frame[at.DONE], later[nodes[at.ROW, ROOTS:] >= 0].min(initial=len(self.data))))
            self.frame[at.BASE] = base
            self.frame[at.SPAN] = min(len(self.data) + 1 - base, STRETCH)
            self._entries(int(self.frame[at.RANGE_ROOM]))
        return kept

    def _begin_again(self) -> None:
        for place, node in enumerate(self.empty, start=1):
            self.open[0, at.H_ROW, place] = self.nodes[at.ROW, node]
        self.empty = []

    @property
    def lost(self) -> float:
        """As of a state."""
        parts = []
        for place in range(int(self.counts[0])):
            scale, mass, true = self.weights[0, :, place]
            if not self.open[0, at.H_ROUGH, place] and mass > 0 and true > -math.inf:
                parts.append(true + math.log(mass / scale))
        if not parts:
            return math.inf
        top = max(parts)
        return float(self.reals[at.LOG] - top - math.log(math.fsum(math.exp(part - top) for part in parts)))
