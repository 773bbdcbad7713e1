"""Token sequences that share what they begin with, read by one model with one cache: trees whose nodes see only what
leads to them.

Every text has a tree, a row of the cache. A new token is one more column of its row, and a mask shows it its ancestors,
so that sequences fork without copying keys and values, and those that nobody holds any more are cut out now and then.
Whether a model honours such masks and positions is tried on itself; one that does not reads every sequence whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from graft.ensemble.byte_level.asking import Ask, Found, Reading, Wanted
from graft.ensemble.byte_level.columns import Places, adopt, cache_of
from graft.ensemble.byte_level.cover import Told
from graft.ensemble.byte_level.leaf import FORGOTTEN, UNREAD, Leaf, alike
from graft.ensemble.byte_level.packed import Piece, blocks_of, packing
from graft.ensemble.byte_level.reader import Reader
from graft.errors import RunError
from graft.evaluate.limits import can_branch, least_window

LOGITS = 2**24
"""Logits that are held at once."""


class Forest:
    """Sequences that a reader has read, `rows` trees of them."""

    def __init__(self, reader: Reader, rows: int = 0):
        self.reader = reader
        self._places = Places()
        self._cache: Any = None
        self._columns: list[int] = []
        self._alive: list[weakref.WeakSet[Leaf]] = []
        self._known: weakref.WeakValueDictionary[tuple[int, int], Leaf] = weakref.WeakValueDictionary()
        self._roots: list[Found] = []
        self._passes = 0
        if rows:
            self.plant(rows)

    def __len__(self) -> int:
        """How many trees there are."""
        return len(self._columns)

    def plant(self, count: int) -> list[int]:
        """New trees; returns their rows."""
        rows = [len(self) + place for place in range(count)]
        self._columns += [0] * count
        self._alive += [weakref.WeakSet() for _ in rows]
        leaves = [Leaf(None, self.reader.start, row) for row in rows]
        self._roots += zip(leaves, self._tell(leaves, first=True), strict=True)
        return rows

    def root(self, row: int = 0) -> Found:
        """The start of every sequence of a tree: before any token."""
        return self._roots[row]

    def find(self, parent: Leaf, token: int) -> Found | None:
        """What is known of a token behind a leaf, or None."""
        parent = parent.now if self.recall(parent) else parent
        leaf = self._known.get((id(parent.again or parent), token))
        told = leaf.told() if leaf is not None and leaf.told is not None else None
        return (leaf, told) if leaf is not None and told is not None else None

    def recall(self, leaf: Leaf) -> bool:
        """Whether it is known what comes behind a leaf, which may have been read since it was left out."""
        if leaf.told is not None or leaf.twin is not None:
            return True
        if leaf.sought != self._passes and leaf.parent is not None:
            leaf.sought = self._passes
            leaf.twin = self.find(leaf.parent, leaf.token)
        return leaf.twin is not None

    def read(self, parent: Leaf, token: int) -> Reading[Found]:
        """The leaf of a token behind a leaf, and what follows it."""
        leaf = Leaf(parent, token)
        yield from self.need([leaf])
        assert leaf.twin is not None
        return leaf.twin

    def catch_up(
        self, unread: Sequence[Leaf], behind: tuple[Leaf, Sequence[int]], alone: Sequence[int] = ()
    ) -> Reading[list[Found]]:
        """Read sequences that were not read, and what they stand behind, in one go; their `twin` says what they are.

        What comes behind the tokens `alone` is found out with it, and tokens one `behind` the other, the first behind a
        leaf, which may be unread. Returns the leaves of those.
        """
        wanted = Wanted()
        for leaf in unread:
            self._place(leaf, wanted)
        above, tokens = behind[0], list(behind[1])
        known: list[Found] = []
        while tokens and (found := self.find(above, tokens[0])):
            known.append(found)
            above = found[0]
            tokens.pop(0)
        above = self._place(above, wanted)
        above = self._roomy(above, wanted) if tokens else above
        before = len(wanted.leaves)
        for token in self._fitting(above, tokens):
            above = wanted.add(above, token)
        if not wanted.leaves and not alone:
            return known
        read = yield Ask(wanted.leaves, alone)
        wanted.keep(read)
        return known + read[before:]

    def need(
        self,
        unread: Sequence[Leaf],
        alone: Sequence[int] = (),
        likely: Callable[[], Sequence[Leaf]] = tuple,
        room: int = 0,
    ) -> Reading[None]:
        """Read sequences that were not read, and what they stand behind; where anything is read by anybody, up to
        `room` leaves of those that will `likely` be needed too."""
        wanted = Wanted()
        for leaf in unread:
            self._place(leaf, wanted)
        needed = len(wanted.leaves)

        def more() -> Sequence[Leaf]:
            for leaf in likely():
                if leaf.parent is None or self.fits(leaf.parent.now):
                    self._place(leaf, wanted)
            return wanted.leaves[needed:]

        wanted.keep((yield Ask(wanted.leaves[:needed], alone, more, room)))

    def _fitting(self, above: Leaf, tokens: Sequence[int]) -> Sequence[int]:
        """The first of the tokens, as many as the model can read behind a leaf."""
        limit = self.reader.limit
        return tokens if limit is None else tokens[: max(0, limit - 1 - above.depth)]

    def fits(self, above: Leaf) -> bool:
        """Whether the model can read a token behind a leaf without leaving out what it has read."""
        return self.reader.limit is None or above.depth + 1 < self.reader.limit

    def _place(self, leaf: Leaf, wanted: Wanted) -> Leaf:
        """The leaf itself where it is read, else a new one among what is wanted."""
        if self.recall(leaf):
            return leaf.now
        if id(leaf) not in wanted.twins:
            assert leaf.parent is not None
            above = self._roomy(self._place(leaf.parent, wanted), wanted)
            wanted.twins[id(leaf)] = leaf, wanted.add(above, leaf.token)
        return wanted.twins[id(leaf)][1]

    def _roomy(self, leaf: Leaf, wanted: Wanted) -> Leaf:
        """The leaf, or where the model can read no further the same with only its newest tokens before it."""
        limit = self.reader.limit
        if limit is None or self.fits(leaf):
            return leaf
        if leaf.again is None and id(leaf) not in wanted.again:
            above = self._roots[leaf.row][0]
            for token in leaf.path(max(1, limit // 2)):
                above = self._known.get((id(above), token)) or wanted.add(above, token)
            wanted.again[id(leaf)] = leaf, above
        return leaf.again or wanted.again[id(leaf)][1]

    def tell(self, leaves: Sequence[Leaf]) -> list[Found]:
        """What follows new leaves, each behind a known one or one before it in the list."""
        told = self._tell(leaves)
        self._passes += 1
        self._known.update({(id(leaf.parent), leaf.token): leaf for leaf in leaves})
        for leaf, each in zip(leaves, told, strict=True):
            above = leaf.parent.told() if leaf.parent is not None and leaf.parent.told is not None else None
            if above is not None and leaf.depth > 1:  # what stands behind a start would be held for ever
                above.held.append((leaf, each))
        return list(zip(leaves, told, strict=True))

    def adopt(self, leaves: Sequence[Leaf], cache: Any, tree: int, columns: np.ndarray) -> None:
        """New leaves of one tree, each behind a known one or one before it, are what stands in columns of a tree of
        another such cache; what the model gives behind them is forgotten."""
        row, begin = leaves[0].row, self._columns[leaves[0].row]
        self._settle([leaves])
        self._known.update({(id(leaf.parent), leaf.token): leaf for leaf in leaves})
        for leaf in leaves:
            leaf.told = FORGOTTEN
        adopt((self._cache, len(self), row, begin), (cache, tree, torch.from_numpy(columns).to(self.reader.device)))

    @torch.inference_mode()
    def _tell(self, leaves: Sequence[Leaf], first: bool = False) -> list[Told]:
        style = style_of(self.reader)
        told: dict[int, Told] = {}
        for group in self._groups(leaves):
            logits = self._plain(group) if style == "plain" else self.branches(group)
            part = [leaf for own in group for leaf in own]
            told |= zip(map(id, part), self.reader.told(logits, first), strict=True)
        for leaf in leaves:
            leaf.told = weakref.ref(told[id(leaf)])
        return [told[id(leaf)] for leaf in leaves]

    def _groups(self, leaves: Sequence[Leaf]) -> Iterator[list[list[Leaf]]]:
        """Leaves that are read in one pass, a list for each tree; where they are padded, trees that need about as many
        stand together."""
        trees: dict[int, list[Leaf]] = {}
        for leaf in leaves:
            trees.setdefault(leaf.row, []).append(leaf)
        if self.reader.style == "packed":
            most = max(1, LOGITS // self.reader.size)
            ordered = [leaf for own in trees.values() for leaf in own]
            for begin in range(0, len(ordered), most):
                part = ordered[begin : begin + most]
                yield [list(own) for _, own in groupby(part, key=lambda leaf: leaf.row)]
            return
        for group in alike(sorted(trees.values(), key=len, reverse=True)):
            most = max(1, LOGITS // (self.reader.size * len(group)))
            for begin in range(0, len(group[0]), most):
                yield [own[begin : begin + most] for own in group if len(own) > begin]

    def _plain(self, group: Sequence[Sequence[Leaf]]) -> torch.Tensor:
        """Logits `[leaves, vocabulary]`, every sequence read whole; those that lead to another are read with it."""
        leaves = [leaf for own in group for leaf in own]
        inner = {id(leaf.parent) for leaf in leaves}
        tips = [leaf for leaf in leaves if id(leaf) not in inner]
        paths = [[self.reader.start, *tip.path()] for tip in tips]
        longest = max(map(len, paths))
        ids = torch.tensor([path + [self.reader.start] * (longest - len(path)) for path in paths])
        logits = self.reader.forward(ids)
        places = {}
        for row, tip in enumerate(tips):
            leaf: Leaf | None = tip
            while leaf is not None:
                places[id(leaf)] = (row, leaf.depth)
                leaf = leaf.parent
        rows, depths = zip(*(places[id(leaf)] for leaf in leaves), strict=True)
        return logits[list(rows), list(depths)]

    @torch.inference_mode()
    def branches(self, group: Sequence[Sequence[Leaf]]) -> torch.Tensor:
        """Logits `[leaves, vocabulary]` of new leaves, a list for each tree, which become columns of the cache."""
        if self._cache is None:
            self._cache = cache_of(self.reader.model.config, self._places)
        rows = [own[0].row for own in group]
        self._compact(rows)
        if self.reader.style == "packed":
            return self._packed(group)
        # a row that is read for nothing costs less than a copy of the others' keys and values
        rows = list(range(len(self))) if 2 * len(rows) > len(self) else rows
        place_of = {row: place for place, row in enumerate(rows)}
        tokens = [(place_of[leaf.row], slot, leaf) for own in group for slot, leaf in enumerate(own)]
        self._settle(group)
        width = max(self._columns[row] for row in rows)
        table = [(place, slot, int(leaf.slots[-1])) for place, slot, leaf in tokens]
        self._places.set(rows, len(self), width, table, self.reader.device)
        logits = self.reader.forward(*self._inputs(tokens, len(rows), width), **self._given(tokens, len(rows), width))
        if self._cache.get_seq_length() != width:
            raise RunError(f"{self.reader.name} keeps no cache of its tokens")
        return logits[[place for place, _, _ in tokens], [slot for _, slot, _ in tokens]]

    def _packed(self, group: Sequence[Sequence[Leaf]]) -> torch.Tensor:
        """The same, all trees' leaves side by side in one row."""
        self._settle(group)
        leaves = [leaf for own in group for leaf in own]
        device, end = self.reader.device, 0
        pieces = []
        for own in group:
            begin, end = end, end + len(own)
            pieces.append(Piece(begin, end, own[0].row, self._seen(own)))
        width = max(self._columns[piece.tree] for piece in pieces)
        table = torch.tensor([(leaf.token, leaf.depth, leaf.row, leaf.slots[-1]) for leaf in leaves])
        ids, depths, trees, columns = table.t().contiguous()
        packed = blocks_of(pieces, self.reader.dtype, device)
        self._places.pack(packed, len(self), width, trees.to(device), columns.to(device))
        given = {
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=self.reader.dtype),  # any of four dimensions is left alone
            "position_ids": depths[None],
            "past_key_values": self._cache,
        }
        with packing(self.reader.model):
            return self.reader.forward(ids[None], use_cache=True, **given)[0]

    def _seen(self, own: Sequence[Leaf]) -> np.ndarray:
        """`[leaves, columns] bool` of leaves of one tree: each sees what leads to it."""
        seen = np.zeros((len(own), self._columns[own[0].row]), bool)
        for place, leaf in enumerate(own):
            seen[place, leaf.slots] = True
        return seen

    def _settle(self, group: Sequence[Sequence[Leaf]]) -> None:
        """Give new leaves their columns."""
        for own in group:
            before = self._columns[own[0].row]
            for column, leaf in enumerate(own, start=before):
                above = leaf.parent.slots if leaf.parent is not None else UNREAD
                leaf.slots = np.concatenate((above, (column,)))
            self._columns[own[0].row] = before + len(own)
            self._alive[own[0].row].update(own)

    def _inputs(self, tokens: Sequence[tuple[int, int, Leaf]], rows: int, width: int) -> tuple[torch.Tensor]:
        ids = np.full((rows, 1 + max(slot for _, slot, _ in tokens)), self.reader.start, np.int64)
        for place, slot, leaf in tokens:
            ids[place, slot] = leaf.token
        return (torch.from_numpy(ids),)

    def _given(self, tokens: Sequence[tuple[int, int, Leaf]], rows: int, width: int) -> dict[str, Any]:
        """The cache, positions, and a mask [rows, 1, longest, width]: each leaf sees what leads to it."""
        longest = 1 + max(slot for _, slot, _ in tokens)
        positions = np.zeros((rows, longest), np.int64)
        seen = np.zeros((rows, longest, width), bool)
        seen[:, :, 0] = True  # padding sees the start
        for place, slot, leaf in tokens:
            positions[place, slot] = leaf.depth
            seen[place, slot, leaf.slots] = True
        mask = torch.from_numpy(seen)[:, None]
        if self.reader.style != "bool":
            dtype = self.reader.dtype
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        given = {"attention_mask": mask, "position_ids": torch.from_numpy(positions)}
        return {**given, "past_key_values": self._cache, "use_cache": True}

    def _compact(self, rows: Sequence[int]) -> None:
        """Cut out of trees what no living sequence sees, where that is most of them."""
        for row in rows:
            if self._columns[row] < 1.25 * len(self._alive[row]) + 32:
                continue
            alive = sorted(self._alive[row], key=lambda leaf: int(leaf.slots[-1]))
            keep = np.array([leaf.slots[-1] for leaf in alive], np.int64)
            place = np.full(self._columns[row], -1, np.int64)
            place[keep] = np.arange(len(keep))
            for leaf in alive:
                leaf.slots = place[leaf.slots]
            for layer in self._cache.layers:
                layer.keep(row, torch.from_numpy(keep))
            self._columns[row] = len(keep)


def style_of(reader: Reader) -> str:
    """How a reader's model takes branching sequences: `packed` side by side in one row, as padded rows with `additive`
    or `bool` masks, or `plain` where it honours none of these."""
    if reader.style is None:
        reader.style = _tried(reader)
    return reader.style


def _tried(reader: Reader) -> str:
    if not can_branch(reader.model) or least_window(reader.model.config) is not None:
        return "plain"
    ids = reader.later.ids
    known = [int(i) for i in ids[:: max(1, len(ids) // 4)]][:4]
    paths = [known[::-1], known[:2] * 2, known[1:] + known[:1]]
    if reader.limit is not None:
        paths = [path[: reader.limit - 1] for path in paths]
    wanted = [reader.whole([reader.start, *path])[-1] for path in paths]
    for style in ("packed", "additive", "bool"):
        reader.style = style
        try:
            found = _as_trees(reader, paths)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, RunError):
            continue
        finally:
            reader.style = None
        scale = 1e-3 if reader.dtype == torch.float32 else 0.1
        if all(_close(a, b, scale) for a, b in zip(found, wanted, strict=True)):
            return style
    return "plain"


def _as_trees(reader: Reader, paths: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits `[vocabulary]` at the end of each path; the first two branch in one tree, the last is a tree by itself."""
    forest = Forest(reader, 2)
    leaf = [forest.root(row)[0] for row in (0, 0, 1)]
    last: list[torch.Tensor] = [torch.empty(0)] * len(paths)
    for step in range(max(map(len, paths))):
        new = {place: Leaf(leaf[place], path[step]) for place, path in enumerate(paths) if step < len(path)}
        trees = [[new[place] for place in tree if place in new] for tree in ((0, 1), (2,))]
        logits = iter(forest.branches([tree for tree in trees if tree]))
        for place, made in new.items():
            leaf[place], last[place] = made, next(logits)
    return last


def _close(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> bool:
    a, b = found.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return bool(((a - b).abs() < scale * (1 + b.abs())).all())
