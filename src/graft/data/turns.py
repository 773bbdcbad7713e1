"""Rows of several tasks: which task gives row i, in mixed batches or one task a batch, in phases.

Everything follows from i alone, so that a killed run goes on exactly and a batch may be read in any pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from graft.data.rows import Row, Rows

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Phase = tuple[int, Sequence[float]]
"""How many turns it has, and the share of each task in them."""


class Evenly:
    """Turns of several tasks by their shares, spread as evenly as can be: equal shares of two give 0, 1, 0, 1, …

    Turn j of a task with share s is due at time (j + 1/2) / s; turns are in the order of these times (stride
    scheduling, Waldspurger & Weihl 1995). After any number of turns every task has had its share, up to about one turn.
    """

    BLOCK = 1024

    def __init__(self, shares: Sequence[float]):
        self.shares = np.asarray(shares, np.float64) / np.sum(shares)
        self._block = -1
        self._start = 0
        self._which = np.zeros(0, np.int64)
        self._number = np.zeros(0, np.int64)

    def __call__(self, turn: int) -> tuple[int, int]:
        """(task, how many turns it had before) at `turn` ≥ 0."""
        self._find(turn)
        place = turn - self._start
        return int(self._which[place]), int(self._number[place])

    def before(self, turn: int) -> np.ndarray:
        """[tasks] how many turns each had before `turn`."""
        self._find(turn)
        had = self._until(self._block)
        return had + np.bincount(self._which[: turn - self._start], minlength=len(self.shares))

    def _until(self, block: int) -> np.ndarray:
        """[tasks] turns of each that are due before the block."""
        return np.floor(self.shares * (block * self.BLOCK) + 0.5).astype(np.int64)

    def _find(self, turn: int) -> None:
        """Arrange the block that `turn` lies in: its time is off from its number by less than the number of tasks."""
        block = turn // self.BLOCK
        while self._until(block + 1).sum() <= turn:
            block += 1
        while block and self._until(block).sum() > turn:
            block -= 1
        if block == self._block:
            return
        first, last = self._until(block), self._until(block + 1)
        which = np.repeat(np.arange(len(first)), last - first)
        number = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        order = np.lexsort((which, (number + 0.5) / self.shares[which]))
        self._which, self._number = which[order], number[order]
        self._block, self._start = block, int(first.sum())


class Turns:
    """Turns in phases: each has its own shares, and a task goes on in its rows where it stood. The last never ends."""

    def __init__(self, phases: Sequence[Phase]):
        self.phases = [Evenly(_possible(shares)) for _, shares in phases]
        self.tasks = [np.flatnonzero(np.asarray(shares) > 0) for _, shares in phases]
        self.starts = np.concatenate([[0], np.cumsum([size for size, _ in phases])]).astype(np.int64)
        had = np.zeros(len(phases[0][1]), np.int64)
        self.had = [had]
        for (size, _), phase, tasks in zip(phases, self.phases, self.tasks, strict=True):
            had = had.copy()
            had[tasks] += phase.before(size)
            self.had.append(had)

    def __call__(self, turn: int) -> tuple[int, int]:
        """(task, how many turns it had before) at `turn` ≥ 0."""
        phase = min(int(np.searchsorted(self.starts, turn, side="right")) - 1, len(self.phases) - 1)
        which, number = self.phases[phase](turn - int(self.starts[phase]))
        task = int(self.tasks[phase][which])
        return task, int(self.had[phase][task]) + number


def _possible(shares: Sequence[float]) -> list[float]:
    return [share for share in shares if share > 0]


def shares_of(sizes: Sequence[int], weights: Sequence[float], *, by_size: bool, temperature: float) -> list[float]:
    """Shares, summing to 1, in proportion to (weight · size)^(1/temperature); sizes count only where `by_size` says so.

    Temperature 1 keeps the proportions, a higher one evens them out (Arivazhagan et al. 2019, section 4.2).
    """
    raw = np.asarray(weights, np.float64) * (np.asarray(sizes, np.float64) if by_size else 1.0)
    raised = np.where(raw > 0, raw / raw.max(), 0.0) ** (1 / temperature)
    return (raised / raised.sum()).tolist()


class TaskRows:
    """Rows of several tasks. A row's arrays are named `TASK/NAME`, and so are a batch's tensors.

    `run` rows behind one another are of one task: 1 for mixed batches, a whole batch for one task a batch.
    """

    def __init__(self, parts: Mapping[str, Rows], turns: Turns, run: int = 1):
        self.parts, self.turns, self.run = dict(parts), turns, run
        self.names = list(parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __getitem__(self, index: int) -> Row:
        turn, place = divmod(index, self.run)
        task, number = self.turns(turn)
        name = self.names[task]
        return named(name, self.parts[name][number * self.run + place])

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return collated(self.parts, rows)


def collated(parts: Mapping[str, Rows], rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows of any of `parts` as one batch: each task's put together by its own rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        for name, own in by_task(row).items():
            found.setdefault(name, []).append(own)
    batch: dict[str, torch.Tensor] = {}
    for name in parts:
        if name in found:
            batch.update(named(name, parts[name].collate(found[name])))
    return batch


def named(task: str, things: Mapping[str, T]) -> dict[str, T]:
    """`{ids: …}` → `{TASK/ids: …}`."""
    return {f"{task}/{name}": thing for name, thing in things.items()}


def by_task(things: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """`{TASK/ids: …}` → `{TASK: {ids: …}}`, tasks in the order in which they stand there."""
    found: dict[str, dict[str, Any]] = {}
    for name, thing in things.items():
        task, _, own = name.partition("/")
        found.setdefault(task, {})[own] = thing
    return found
