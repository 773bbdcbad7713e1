"""Texts whose last tokens are drafts, and what each member has said of them.

All texts of a batch end in the same column and begin where they must, as in a batch that is padded on the left. Rows
of which more drafts are kept than of others grow faster, so after each judgement every row is moved until it ends where
the others do, in the text, in every layer of the cache, and in what the members have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from graft.ensemble.gate import Told, joined

if TYPE_CHECKING:
    from graft.ensemble.causal import EnsembleForCausalLM


@dataclass(frozen=True)
class Verdict:
    """On a row's drafts: how many were `judged`, how many of these `kept`, and the token `instead` of the next one."""

    judged: int
    kept: int
    instead: int | None


class Pending:
    """`text [rows, length]`, of which row r's begins in column `starts[r]` and ends with drafts of the members `by[r]`.

    `drawn [rows, …, vocabulary]`: the probabilities that the last columns were drawn from, None where they were not
    drawn. `seen`: columns that each active member has read; `told`: what it said last, up to the column behind them.
    """

    def __init__(self, model: EnsembleForCausalLM, ids: torch.Tensor, starts: Sequence[int]):
        self.model, self.text, self.starts = model, ids, list(starts)
        self.rows = list(range(len(ids)))
        self.by: list[list[int]] = [[] for _ in self.rows]
        self.drawn: torch.Tensor | None = None
        self.seen = [0] * len(model.active)
        self.told: list[Told | None] = [None] * len(model.active)
        self.cache = DynamicCache(config=model.config)

    @property
    def length(self) -> int:
        """Columns, drafts included."""
        return self.text.shape[1]

    @property
    def first(self) -> int:
        """The first column that holds a draft in any row, or would hold the next one."""
        return self.length - max(map(len, self.by))

    @property
    def stop(self) -> int:
        """The column before which all members have said what they think of every draft."""
        return min(min(self.seen) + 1, self.length)

    def read(self, number: int, until: int) -> None:
        """An active member reads the columns before `until` that are new to it."""
        seen, gate = self.seen[number], self.model.gate
        if seen >= until:
            return
        keep = max(1, min(until - seen, until - self.first + 1))
        mask, positions = self._places(seen, until)
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        states = gate is not None and gate.states and number in gate.looks_at
        new = self.model._asked(self.model.active[number], self.text[:, seen:until], given, self.cache, states)
        old = self.told[number]
        self.told[number] = joined([old, new]) if old is not None and keep == until - seen else new
        self.seen[number] = until

    def _places(self, seen: int, until: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mask `[rows, until]` and positions `[rows, until - seen]` of a padded batch; a single row needs none."""
        if len(self.rows) == 1:
            return None, None
        starts = torch.tensor(self.starts, device=self.text.device)[:, None]
        places = torch.arange(until, device=self.text.device) - starts
        return (places >= 0).long(), places[:, seen:].clamp(min=0)

    def draft(self, number: int, tokens: torch.Tensor, probs: torch.Tensor | None) -> None:
        """Adds a member's draft to every row: `tokens [rows]`, drawn from `probs [rows, vocabulary]`."""
        self.text = torch.cat([self.text, tokens[:, None]], 1)
        if probs is not None:
            new = probs[:, None]
            self.drawn = new if self.drawn is None else torch.cat([self.drawn, new], 1)
        for row in self.by:
            row.append(number)

    def said(self, number: int, first: int, stop: int) -> Told:
        """What a member has said of the columns from `first` to before `stop`."""
        told, end = self.told[number], self.seen[number] + 1
        assert told is not None
        part = slice(first - end, (stop - end) or None)
        return Told(told.log_probs[:, part], None if told.state is None else told.state[:, part])

    def settle(self, verdicts: Sequence[Verdict], done: Sequence[bool]) -> None:
        """Drops the drafts that were not kept, and the rows that are `done`; what is left ends together again."""
        ends, reads = [], []
        for row, verdict in enumerate(verdicts):
            firm, end = self.length - len(self.by[row]) + verdict.kept, self.length
            self.by[row] = self.by[row][verdict.judged :]
            if verdict.instead is not None:
                self.text[row, firm], self.by[row], end = verdict.instead, [], firm + 1
            ends.append(end)
            reads.append(end - (verdict.instead is not None))
        stay = [row for row, over in enumerate(done) if not over]
        if stay:
            self._move(stay, [ends[row] for row in stay], [reads[row] for row in stay])
        self.rows, self.by = [self.rows[row] for row in stay], [self.by[row] for row in stay]

    def _move(self, stay: list[int], ends: list[int], reads: list[int]) -> None:
        """The rows that `stay` end together; of each, the columns before `reads` are as members have read them."""
        length = max(end - self.starts[row] for row, end in zip(stay, ends, strict=True))
        move = _Move(stay, [length - end for end in ends], reads, len(self.rows))
        most = max(len(self.by[row]) for row in stay)
        if self.drawn is not None:
            begin = self.length - self.drawn.shape[1]
            self.drawn = move(self.drawn, 1, begin, length - most, length) if most else None
        self.starts = [self.starts[row] + shift for row, shift in zip(stay, move.shifts, strict=True)]
        self.text = move(self.text, 1, 0, 0, length)
        for number, told in enumerate(self.told):
            before, self.seen[number] = self.seen[number], move.read(self.seen[number])
            if told is not None:
                self.told[number] = _moved(move, told, before + 1, length - most, self.seen[number] + 1)
        for place, layer in enumerate(self.cache.layers):
            if there := int(self.cache.get_seq_length(place)):
                move.layer(layer, there)


def _moved(move: _Move, told: Told, end: int, first: int, stop: int) -> Told | None:
    """What a member said of the columns before `end`, after the move; of the columns `first` to `stop` at most."""
    begin = end - told.log_probs.shape[1]
    first = max(first, begin + min(move.shifts))
    if first >= stop:
        return None
    parts = [None if each is None else move(each, 1, begin, first, stop) for each in (told.log_probs, told.state)]
    return Told(*parts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Move:
    """Moves the rows that `stay` of so many `rows` to the right, each by its own number of columns (`shifts`); of each,
    the columns before `reads` (counted before the move) are as members have read them."""

    stay: list[int]
    shifts: list[int]
    reads: list[int]
    rows: int

    def read(self, count: int) -> int:
        """Of `count` columns that were read, how many are right in all rows after the move."""
        return max(0, min(min(count, right) + shift for right, shift in zip(self.reads, self.shifts, strict=True)))

    def layer(self, layer: Any, there: int) -> None:
        """A layer of the cache that holds so many columns."""
        count = self.read(there)
        if not count:
            layer.reset()
        elif count < there or any(self.shifts) or len(self.stay) < self.rows:
            layer.keys, layer.values = (self(each, 2, 0, 0, count) for each in (layer.keys, layer.values))

    def __call__(self, values: torch.Tensor, dim: int, begin: int, first: int, stop: int) -> torch.Tensor:
        """Columns `first` to `stop` after the move, of `values` whose dimension `dim` are the columns from `begin`;
        anything where a row had no such column."""
        if len(set(self.shifts)) == 1:
            values = values if len(self.stay) == self.rows else values[self.stay]
            return values.narrow(dim, first - self.shifts[0] - begin, stop - first)
        rows = torch.tensor(self.stay, device=values.device)[:, None]
        shifts = torch.tensor(self.shifts, device=values.device)[:, None]
        columns = torch.arange(first - begin, stop - begin, device=values.device) - shifts
        columns = columns.clamp(0, values.shape[dim] - 1)
        if dim == 1:
            return values[rows, columns]
        return values.transpose(1, 2)[rows, columns].transpose(1, 2)
