"""Keys and values of many token trees in one batch: a tree is a row of it, whose columns are its tokens.

Rows have different numbers of columns, so a forward pass writes each token into the next free column of its own row, in
place; nothing that was kept before is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from graft.adapters.second_cache import both
from graft.ensemble.byte_level.packed import Blocks

ROOM = 64
"""Columns by which a row that is full grows at least."""


class Places:
    """Where the tokens of a forward pass go: its `rows` among those of the trees (None: they are all, in order); token
    `slots [n]` of row `batch [n]` goes into column `columns [n]` of tree `trees [n]`. `count` trees; the pass sees
    `width` columns. `packed`: where all stand in one row, what each tree has of it."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.count, self.width = 0, 0
        self.batch = self.slots = self.trees = self.columns = torch.zeros(0, dtype=torch.long)
        self.packed: Blocks | None = None
        self._lines: tuple[tuple[int, int], torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        return self  # a copy of a layer stands in the same cache and looks here as well

    def set(
        self, rows: Sequence[int], count: int, width: int, tokens: Sequence[tuple[int, int, int]], device: torch.device
    ) -> None:
        """`rows`: the trees that stand in the pass, of `count`; `tokens`: of each (row of the pass, slot, column)."""
        self.count, self.width, self.packed, self._lines = count, width, None, None
        self.rows = None if len(rows) == count else torch.tensor(rows, device=device)
        table = torch.tensor([(batch, slot, rows[batch], column) for batch, slot, column in tokens], device=device)
        self.batch, self.slots, self.trees, self.columns = table.unbind(1)

    def pack(self, packed: Blocks, count: int, width: int, trees: torch.Tensor, columns: torch.Tensor) -> None:
        """All tokens in one row, `packed`: the tree and the column of each."""
        self.count, self.width, self.packed, self.rows = count, width, packed, None
        self.trees, self.columns, self._lines = trees, columns, None

    def lines(self, heads: int, room: int) -> torch.Tensor:
        """`[tokens · heads]`: where each token's heads go in a layer of so many heads and columns, one a line."""
        if self._lines is None or self._lines[0] != (heads, room):
            self._lines = (heads, room), _lines(self.trees, self.columns, heads, room)
        return self._lines[1]


def _lines(trees: torch.Tensor, columns: torch.Tensor, heads: int, room: int) -> torch.Tensor:
    """`[n · heads]`: the lines of columns `[n]` of trees `[n]` in a layer that has a line for each head's column."""
    head = torch.arange(heads, device=trees.device)
    return ((trees[:, None] * heads + head) * room + columns[:, None]).flatten()


class Columns(DynamicLayer):
    """A layer: `keys`, `values` `[trees, heads, room, channels]`, of which places that no token has are never seen."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write a pass's tokens; returns what it sees, `[rows, heads, width, channels]`, or where they stand in one row
        the layer itself, for attention that knows it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._written(self.keys, key_states)
        self.values = self._written(self.values, value_states)
        return (self, self) if self.places.packed else (self._seen(self.keys), self._seen(self.values))

    def _written(self, kept: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        places = self.places
        assert kept is not None
        kept = _roomy(kept, places.count, places.width, new)
        own = new[0].transpose(0, 1) if places.packed else new[places.batch, :, places.slots]
        kept.view(-1, kept.shape[3]).index_copy_(0, places.lines(*kept.shape[1:3]), own.flatten(0, 1))
        return kept

    def _seen(self, kept: torch.Tensor) -> torch.Tensor:
        seen = kept[:, :, : self.places.width]
        return seen if self.places.rows is None else seen.index_select(0, self.places.rows)

    def get_seq_length(self) -> int:
        """Columns that the last pass saw; 0 where nothing was written."""
        return self.places.width if self.is_initialized else 0

    def keep(self, tree: int, columns: torch.Tensor) -> None:
        """Only these columns of a tree, in this order."""
        for kept in (self.keys, self.values):
            assert kept is not None
            kept[tree, :, : len(columns)] = kept[tree].index_select(1, columns.to(kept.device))


def _roomy(kept: torch.Tensor, count: int, width: int, new: torch.Tensor) -> torch.Tensor:
    """The same with room for so many trees and columns; what is added is zero."""
    shape = kept.shape if kept.dim() == 4 else (0, new.shape[1], 0, new.shape[3])
    if shape[0] >= count and shape[2] >= width:
        return kept
    room = shape[2] if shape[2] >= width else width + max(ROOM, width // 4)
    made = new.new_zeros(max(count, shape[0]), shape[1], room, shape[3])
    if kept.dim() == 4:
        made[: shape[0], :, : shape[2]] = kept
    return made


def move(layers: Iterable[Columns], trees: torch.Tensor, columns: torch.Tensor, places: torch.Tensor) -> None:
    """What is in `columns [n]` of trees `[n]` goes to columns `places [n]` of the same trees, all at once."""
    found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in layers:
        for kept in (layer.keys, layer.values):
            assert kept is not None
            heads, room = shape = (kept.shape[1], kept.shape[2])
            if shape not in found:
                found[shape] = _lines(trees, columns, heads, room), _lines(trees, places, heads, room)
            sources, targets = found[shape]
            lines = kept.view(-1, kept.shape[3])
            lines.index_copy_(0, targets, lines.index_select(0, sources))


def adopt(place: tuple[Any, int, int, int], source: tuple[Any, int, torch.Tensor]) -> None:
    """`source`: a cache, a tree of it, and its columns, which become those of another one at a `place`: the cache, its
    number of trees, the tree, and the first of its columns that they become."""
    (cache, count, row, begin), (others, tree, columns) = place, source
    end = begin + len(columns)
    for layer, other in both(cache, others):
        layer.keys, layer.values = (_roomy(kept, count, end, kept) for kept in (layer.keys, layer.values))
        layer.keys[row, :, begin:end] = other.keys[tree].index_select(1, columns)
        layer.values[row, :, begin:end] = other.values[tree].index_select(1, columns)


def cache_of(config: Any, places: Places) -> DynamicCache:
    """A cache of such layers, one for each of a model's."""
    cache = DynamicCache(config=config)
    cache.layers = [Columns(places) for _ in cache.layers]
    return cache
