"""Texts whose last tokens are drafts, and what each member has said of them.

All texts of a batch end in the same column and begin where they must, as in a batch that is padded on the left. Rows
of which more drafts are kept than of others grow faster, so after each judgement every row is moved until it ends where
the others do: in the text, in what the members have said, and in the cache of a member when it reads again, unless that
has a place for each row (`placed.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from graft.adapters.second_cache import readings
from graft.ensemble.gate import Told, joined
from graft.ensemble.placed import Masks, PlacedLayer, Places, can_be_placed, masks_of

if TYPE_CHECKING:
    from graft.ensemble.causal import EnsembleForCausalLM


@dataclass(frozen=True)
class Verdict:
    """On a row's drafts: how many were `judged`, how many of these `kept`, and the token `instead` of the next one."""

    judged: int
    kept: int
    instead: int | None


@dataclass
class _Reader:
    """What is known of an active member: the rows of its layers of the cache with the columns they began in when these
    were last put in order, how many tokens of each row's text it has read that still stand, the places in its layers
    where these need no order, and what it said last."""

    rows: list[int]
    starts: list[int]
    own: dict[int, int]
    places: Places | None
    told: Told | None = None


class Pending:
    """`text [rows, length]`, of which row r's begins in column `starts[r]` and ends with drafts of the members `by[r]`.

    `rows`: those of the batch that are left; `drawn [rows, …, vocabulary]`: the probabilities of which the last columns
    were drawn, None where they were not drawn.
    """

    def __init__(self, model: EnsembleForCausalLM, ids: torch.Tensor, starts: Sequence[int]):
        self.model, self.text, self.starts = model, ids, list(starts)
        self.rows = list(range(len(ids)))
        self.by: list[list[int]] = [[] for _ in self.rows]
        self.drawn: torch.Tensor | None = None
        self.cache = DynamicCache(config=model.config)
        self.places: dict[Masks, Places] = {}
        self.readers = [self._reader(place) for place in model.active]
        self._placed: tuple[Any, torch.Tensor] | None = None

    def _reader(self, place: int) -> _Reader:
        """Of a member, whose layers of the cache are placed where it can read so."""
        member, (first, stop) = self.model.members[place], self.model.spans[place]
        places = None
        if can_be_placed(member):
            masks = masks_of(member)
            places = self.places.setdefault(masks, Places(masks))
            self.cache.layers[first:stop] = [PlacedLayer(places) for _ in range(first, stop)]
        own = {row: -start for row, start in enumerate(self.starts)}
        return _Reader(list(self.rows), list(self.starts), own, places)

    @property
    def length(self) -> int:
        """Columns, drafts included."""
        return self.text.shape[1]

    @property
    def first(self) -> int:
        """The first column that holds a draft in any row, or would hold the next one."""
        return self.length - max(map(len, self.by))

    def seen(self, number: int) -> int:
        """How many columns a member has read that still stand in all rows."""
        own = self.readers[number].own
        return min(start + own[row] for row, start in zip(self.rows, self.starts, strict=True))

    @property
    def stop(self) -> int:
        """The column before which all members have said what they think of every draft."""
        return min(min(map(self.seen, range(len(self.readers)))) + 1, self.length)

    def read(self, number: int, until: int) -> int:
        """An active member reads the columns before `until` that are new to it; returns how many."""
        reader, seen, gate = self.readers[number], self.seen(number), self.model.gate
        if seen >= until:
            return 0
        self._order(number, seen)
        places = self.readers[number].places
        keep = max(1, min(until - seen, until - self.first + 1))
        mask, positions = self._padded(seen, until) if places is None else self._unpadded(places, seen, until)
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        states = gate is not None and gate.states and number in gate.looks_at
        new = self.model._asked(self.model.active[number], self.text[:, seen:until], given, self.cache, states)
        reader.told = joined([reader.told, new]) if reader.told is not None and keep == until - seen else new
        reader.own = {row: until - start for row, start in zip(self.rows, self.starts, strict=True)}
        return until - seen

    def _order(self, number: int, seen: int) -> None:
        """Puts a member's layers of the cache in the order that the text has by now."""
        reader, span = self.readers[number], self.model.spans[self.model.active[number]]
        ordered = reader.starts == self.starts and self.cache.get_seq_length(span[0]) == seen
        if reader.rows == self.rows and (ordered or reader.places is not None):
            return
        stay = [reader.rows.index(row) for row in self.rows]
        if reader.places is not None:
            layers: list[Any] = self.cache.layers[slice(*span)]
            for layer in layers:
                layer.keep(stay)
            reader.rows = list(self.rows)
            return
        shifts = [start - reader.starts[place] for start, place in zip(self.starts, stay, strict=True)]
        reads = [reader.starts[place] + reader.own[row] for row, place in zip(self.rows, stay, strict=True)]
        move = _Move(stay, shifts, len(reader.rows))
        for place in range(*span):
            if there := int(self.cache.get_seq_length(place)):
                for layer in readings(self.cache.layers[place]):
                    move.layer(layer, there, reads)
        reader.rows, reader.starts = list(self.rows), list(self.starts)

    def _unpadded(self, places: Places, seen: int, until: int) -> tuple[Any, torch.Tensor]:
        """Mask and positions `[rows, until - seen]` for a member that has a place for each row."""
        positions = self._positions(seen, until)
        mask = places.go_to(positions, until - min(self.starts), seen)
        return mask if seen else self._padded(seen, until)[0], positions.clamp(min=0)

    def _positions(self, seen: int, until: int) -> torch.Tensor:
        """Of the columns from `seen` to before `until`, `[rows, columns]`, below 0 where the text has not begun."""
        if self._placed is None or self._placed[0] != (seen, until, self.starts):
            starts = torch.tensor(self.starts, device=self.text.device)[:, None]
            self._placed = (seen, until, list(self.starts)), torch.arange(seen, until, device=self.text.device) - starts
        return self._placed[1]

    def _padded(self, seen: int, until: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mask `[rows, until]` and positions `[rows, until - seen]` of a padded batch; others need none."""
        if not any(self.starts):
            return None, None
        starts = torch.tensor(self.starts, device=self.text.device)[:, None]
        mask = (torch.arange(until, device=self.text.device) >= starts).long()
        return mask, self._positions(seen, until).clamp(min=0)

    def write(self, tokens: torch.Tensor) -> None:
        """Adds a token to every row `[rows]`, all of whose drafts have been judged."""
        self.text = torch.cat([self.text, tokens[:, None]], 1)
        for reader in self.readers:
            reader.told = None

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
        told, end = self.readers[number].told, self.seen(number) + 1
        assert told is not None
        part = slice(first - end, (stop - end) or None)
        return Told(told.log_probs[:, part], None if told.state is None else told.state[:, part])

    def settle(self, verdicts: Sequence[Verdict], done: Sequence[bool]) -> None:
        """Drops the drafts that were not kept, and the rows that are `done`; what is left ends together again."""
        ends, seen = [], [self.seen(number) for number in range(len(self.readers))]
        for place, verdict in enumerate(verdicts):
            firm, end = self.length - len(self.by[place]) + verdict.kept, self.length
            self.by[place] = self.by[place][verdict.judged :]
            if verdict.instead is not None:
                self.text[place, firm], self.by[place], end = verdict.instead, [], firm + 1
                for reader in self.readers:
                    own = reader.own[self.rows[place]]
                    reader.own[self.rows[place]] = min(own, firm - self.starts[place])
            ends.append(end)
        stay = [place for place, over in enumerate(done) if not over]
        if stay:
            self._move(stay, [ends[place] for place in stay], seen)
        self.rows, self.by = [self.rows[place] for place in stay], [self.by[place] for place in stay]

    def _move(self, stay: list[int], ends: list[int], seen: list[int]) -> None:
        """The rows that `stay` end together; members had read the first `seen` columns of each."""
        length = max(end - self.starts[place] for place, end in zip(stay, ends, strict=True))
        most = max(len(self.by[place]) for place in stay)
        move = _Move(stay, [length - end for end in ends], len(self.rows))
        if self.drawn is not None:
            begin = self.length - self.drawn.shape[1]
            self.drawn = move(self.drawn, 1, begin, length - most, length) if most else None
        self.starts = [self.starts[place] + shift for place, shift in zip(stay, move.shifts, strict=True)]
        self.text = move(self.text, 1, 0, 0, length)
        rows = [self.rows[place] for place in stay]
        for reader, before in zip(self.readers, seen, strict=True):
            now = min(start + reader.own[row] for row, start in zip(rows, self.starts, strict=True))
            if reader.told is not None:
                reader.told = _moved(move, reader.told, before + 1, length - most, now + 1)


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
    """Moves the rows that `stay` of so many `rows` to the right, each by its own number of columns (`shifts`)."""

    stay: list[int]
    shifts: list[int]
    rows: int
    picked: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    """Which columns are picked from one long list of them, by what they are picked from."""

    def layer(self, layer: Any, there: int, reads: Sequence[int]) -> None:
        """A layer of the cache that holds so many columns, of which the first `reads` of each row still stand."""
        count = max(0, min(min(there, right) + shift for right, shift in zip(reads, self.shifts, strict=True)))
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
        shape, key = values.shape, (values.device, *values.shape[: dim + 1], begin, first, stop)
        if key not in self.picked:
            self.picked[key] = self._pick(shape[: dim + 1], begin, first, stop, values.device)
        # picking from one long list of columns is as fast as a copy, unlike `gather`
        found = values.flatten(0, dim).index_select(0, self.picked[key])
        return found.view(len(self.stay), *shape[1:dim], stop - first, *shape[dim + 1 :])

    def _pick(self, shape: torch.Size, begin: int, first: int, stop: int, device: torch.device) -> torch.Tensor:
        every = torch.arange(shape.numel(), device=device).view(shape[0], -1, shape[-1])
        rows, shifts = torch.tensor([self.stay, self.shifts], device=device)
        columns = torch.arange(first - begin, stop - begin, device=device) - shifts[:, None]
        return (every[rows, :, :1] + columns.clamp(0, shape[-1] - 1)[:, None]).flatten()
