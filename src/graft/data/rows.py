"""Rows: what training eats. The whole position in the data is one integer, so that a killed run goes on exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

Row = dict[str, np.ndarray]
"""One example: named arrays, for example `input_ids [length] int64`."""


class Rows(Protocol):
    """An endless, seeded, randomly accessible sequence of examples."""

    def __len__(self) -> int:
        """Rows in one epoch."""

    def __getitem__(self, index: int) -> Row:
        """Row `index` ≥ 0; the epoch is `index // len(self)`. Depends on the seed and `index` alone."""

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The rows as one batch of tensors."""


class Order:
    """The order of `count` things in every epoch: a permutation drawn from (seed, epoch), made when first asked for."""

    def __init__(self, count: int, seed: int, shuffle: bool = True):
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._epoch = -1
        self._permutation = np.arange(count)

    def __call__(self, index: int) -> tuple[int, int]:
        """(epoch, which thing) at position `index` ≥ 0."""
        epoch, place = divmod(index, self.count)
        if not self.shuffle:
            return epoch, place
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return epoch, int(self._permutation[place])


class ListRows:
    """Rows held in a list, for small sets and tests; shuffled anew in each epoch unless `shuffle` is False."""

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]] | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ):
        self.rows, self.order = rows, Order(len(rows), seed, shuffle)
        self._collate = collate or stack

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.order(index)[1]]

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return self._collate(rows)


def stack(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows of equal shapes stacked along a new first dimension."""
    import torch

    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
