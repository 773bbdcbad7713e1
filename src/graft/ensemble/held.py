"""What a member's layers of the cache hold of texts whose ends change: which column is which token of which row.

Tokens that no longer stand are hidden by the mask, not moved; columns and rows are dropped where most are of no use. A
member that counts columns (one with windows, or that is given no positions) finds the tokens of each row one behind the
other, at the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from graft.ensemble.base import Ensemble
from graft.evaluate.limits import least_window

USED = 0.6
"""Share of the cache that must be of use; below it what stands is put together."""


@dataclass
class Held:
    """`layers` of the cache, of the batch's `rows` in this order; `gaps`: whether hidden columns may stand between
    others; `places`: of each row the columns of its tokens that stand, in order; `mask [rows, columns]`: those."""

    layers: Sequence[Any]
    rows: list[int]
    gaps: bool
    places: dict[int, list[int]] = field(init=False)
    mask: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.places = {row: [] for row in self.rows}
        self.mask = np.zeros((len(self.rows), 0), np.int64)

    def count(self, row: int) -> int:
        """How many tokens of a row have been read and stand."""
        return len(self.places[row])

    def forget(self, row: int, stand: int) -> None:
        """Of a row only the first `stand` tokens stand any more."""
        if gone := self.places[row][stand:]:
            self.mask[self.rows.index(row), gone] = 0
            del self.places[row][stand:]

    def tidy(self, rows: Sequence[int]) -> None:
        """Drops columns behind the last one that stands in any of these `rows`; where most of the cache is of no use,
        or gaps may not be, only what stands is left, of these rows."""
        longest = max(map(self.count, rows))
        end = max((self.places[row][-1] + 1 for row in rows if self.places[row]), default=0)
        solid = self.gaps or all(self.places[row] == list(range(end - self.count(row), end)) for row in rows)
        if not solid or len(rows) * longest < USED * len(self.rows) * end:
            self._pack(rows, longest)
        elif end < self.mask.shape[1]:
            self.mask = self.mask[:, :end]
            for layer in filter(_filled, self.layers):
                layer.keys, layer.values = (each[:, :, :end] for each in (layer.keys, layer.values))

    def _pack(self, rows: Sequence[int], longest: int) -> None:
        columns, mask = np.zeros((2, len(rows), longest), np.int64)
        for at, row in enumerate(rows):
            first = longest - self.count(row)
            columns[at, first:], mask[at, first:] = self.places[row], 1
            self.places[row] = list(range(first, longest))
        picked = _Picked(np.array([self.rows.index(row) for row in rows]), columns)
        for layer in filter(_filled, self.layers):
            layer.keys, layer.values = (picked(each) for each in (layer.keys, layer.values))
        self.rows, self.mask = list(rows), mask

    def add(self, new: Mapping[int, Sequence[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """The member is about to read `new` tokens of some rows: its inputs `[rows, longest]`, those of a row at the
        right, and the mask and positions that go with them (None where they say nothing)."""
        before, width = self.mask.shape[1], max(map(len, new.values()))
        ids, positions, mask = np.zeros((3, len(self.rows), width), np.int64)
        for at, row in enumerate(self.rows):
            if tokens := new.get(row):
                first, own = width - len(tokens), self.count(row)
                ids[at, first:], mask[at, first:] = tokens, 1
                positions[at, first:] = range(own, own + len(tokens))
                self.places[row] += range(before + first, before + width)
        self.mask = np.concatenate([self.mask, mask], 1)
        told = {"attention_mask": self.mask, "position_ids": positions}
        plain = bool(self.mask.all())
        return torch.from_numpy(ids), {name: None if plain else torch.from_numpy(told[name]) for name in told}


class _Picked:
    """Picks `columns [new rows, new columns]` of these `rows` out of tensors `[rows, heads, columns, channels]`."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray):
        self.rows, self.columns = torch.from_numpy(rows), torch.from_numpy(columns)
        self._found: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        _, heads, width, channels = values.shape
        key = (heads, width, values.device)
        if key not in self._found:
            starts = (self.rows[:, None] * heads + torch.arange(heads)) * width
            self._found[key] = (starts[..., None] + self.columns[:, None]).flatten().to(values.device)
        # picking from one long list of columns is as fast as a copy, unlike `gather`
        found = values.flatten(0, 2).index_select(0, self._found[key])
        return found.view(len(self.rows), heads, -1, channels)


def _filled(layer: Any) -> bool:
    return bool(layer.get_seq_length())


def counts_columns(member: Any, takes: set[str]) -> bool:
    """Whether what a member sees of a token depends on how many columns it is away, rather than on positions alone;
    `takes`: names of what its `forward` is given. A member that is an ensemble does as any of its own."""
    if isinstance(member, Ensemble):
        return any(map(counts_columns, member.members, member.takes))
    return "position_ids" not in takes or least_window(member.config) is not None
