"""Keys and values of many token trees in one batch: a tree is a row of it, whose columns are its tokens.

Rows have different numbers of columns, so a forward pass writes each token into the next free column of its own row, in
place; nothing that was kept before is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from graft.ensemble.byte_level.packed import Piece

ROOM = 64
"""Columns by which a row that is full grows at least."""


class Places:
    """Where the tokens of a forward pass go: its `rows` among those of the trees (None: they are all, in order); token
    `slots [n]` of row `batch [n]` goes into column `columns [n]` of tree `trees [n]`. `count` trees; the pass sees
    `width` columns. `pieces`: where all stand in one row, what each tree has of it."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.count, self.width = 0, 0
        self.batch = self.slots = self.trees = self.columns = torch.zeros(0, dtype=torch.long)
        self.pieces: Sequence[Piece] = ()

    def set(
        self, rows: Sequence[int], count: int, width: int, tokens: Sequence[tuple[int, int, int]], device: torch.device
    ) -> None:
        """`rows`: the trees that stand in the pass, of `count`; `tokens`: of each (row of the pass, slot, column)."""
        self.count, self.width, self.pieces = count, width, ()
        self.rows = None if len(rows) == count else torch.tensor(rows, device=device)
        table = torch.tensor([(batch, slot, rows[batch], column) for batch, slot, column in tokens], device=device)
        self.batch, self.slots, self.trees, self.columns = table.unbind(1)

    def pack(self, pieces: Sequence[Piece], count: int, width: int, columns: torch.Tensor) -> None:
        """All tokens in one row: `pieces` of it, the column of each token."""
        self.count, self.width, self.pieces, self.rows = count, width, pieces, None
        sizes = torch.tensor([piece.end - piece.begin for piece in pieces], device=columns.device)
        self.trees = torch.tensor([piece.tree for piece in pieces], device=columns.device).repeat_interleave(sizes)
        self.columns = columns


class Columns(DynamicLayer):
    """A layer: `keys`, `values` `[trees, room, heads, channels]`, of which places that no token has are never seen."""

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
        return (self, self) if self.places.pieces else (self._seen(self.keys), self._seen(self.values))

    def _written(self, kept: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        places = self.places
        assert kept is not None
        kept = _roomy(kept, places.count, places.width, new)
        to = places.trees * kept.shape[1] + places.columns
        own = new.transpose(1, 2)
        kept.view(-1, *kept.shape[2:])[to] = own[0] if places.pieces else own[places.batch, places.slots]
        return kept

    def _seen(self, kept: torch.Tensor) -> torch.Tensor:
        seen = kept[:, : self.places.width]
        seen = seen if self.places.rows is None else seen.index_select(0, self.places.rows)
        return seen.transpose(1, 2)

    def get_seq_length(self) -> int:
        """Columns that the last pass saw; 0 where nothing was written."""
        return self.places.width if self.is_initialized else 0

    def keep(self, tree: int, columns: torch.Tensor) -> None:
        """Only these columns of a tree, in this order."""
        for kept in (self.keys, self.values):
            assert kept is not None
            kept[tree, : len(columns)] = kept[tree].index_select(0, columns.to(kept.device))


def _roomy(kept: torch.Tensor, count: int, width: int, new: torch.Tensor) -> torch.Tensor:
    """The same with room for so many trees and columns; what is added is zero."""
    shape = kept.shape if kept.dim() == 4 else (0, 0, new.shape[1], new.shape[3])
    if shape[0] >= count and shape[1] >= width:
        return kept
    room = shape[1] if shape[1] >= width else width + max(ROOM, width // 4)
    made = new.new_zeros(max(count, shape[0]), room, *shape[2:])
    if kept.dim() == 4:
        made[: shape[0], : shape[1]] = kept
    return made


def cache_of(config: Any, places: Places) -> DynamicCache:
    """A cache of such layers, one for each of a model's."""
    cache = DynamicCache(config=config)
    cache.layers = [Columns(places) for _ in cache.layers]
    return cache
