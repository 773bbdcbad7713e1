"""Texts whose last tokens are drafts, and what each member has said of them.

Rows go on as far as their own drafts are kept; none waits for another. A member reads in one run what is new to it in
all rows, however much that is in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

from graft.ensemble.gate import Told
from graft.ensemble.held import Held, counts_columns
from graft.ensemble.judging import Judged, Verdict

if TYPE_CHECKING:
    from graft.ensemble.causal import EnsembleForCausalLM


Cell = tuple[int, int]
"""A row and the position in its text of which something is said."""


class Pending:
    """`texts` of rows, of which the first `firm` tokens stand and the others are drafts, of the members `by` and drawn
    from the probabilities `drawn [vocabulary]` (none where they were not drawn).

    `rows`: those that are left, which are shorter than their `limits`.
    """

    def __init__(self, model: EnsembleForCausalLM, texts: list[list[int]], limits: Sequence[int]):
        self.model, self.texts, self.limits = model, texts, limits
        self.firm = list(map(len, texts))
        self.rows = [row for row, text in enumerate(texts) if len(text) < limits[row]]
        self.by: list[list[int]] = [[] for _ in texts]
        self.drawn: list[list[torch.Tensor]] = [[] for _ in texts]
        self.cache = DynamicCache(config=model.config)
        self.held = [self._held(place) for place in model.active]
        self.told: list[list[dict[int, Told]]] = [[{} for _ in texts] for _ in model.active]

    def _held(self, place: int) -> Held:
        start, stop = self.model.spans[place]
        gaps = not counts_columns(self.model.members[place], self.model.takes[place])
        return Held(self.cache.layers[start:stop], list(self.rows), gaps)

    @property
    def drafts(self) -> bool:
        """Whether any row ends with a draft."""
        return any(self.by[row] for row in self.rows)

    def reads(self, number: int) -> int:
        """How many tokens of a row are new to an active member, at most."""
        return max(len(self.texts[row]) - self.held[number].count(row) for row in self.rows)

    def read(self, number: int) -> None:
        """An active member reads all that is new to it."""
        held, most, gate = self.held[number], self.reads(number), self.model.gate
        if not most:
            return
        if not held.gaps:
            for row in self.rows:
                held.forget(row, max(0, len(self.texts[row]) - most))
        held.tidy(self.rows)
        new = {row: self.texts[row][held.count(row) :] for row in self.rows}
        keep = max(min(len(new[row]), len(self.by[row]) + 1) for row in self.rows)
        ids, given = held.add(new)
        states = gate is not None and gate.states and number in gate.looks_at
        asked = {**given, "logits_to_keep": keep}
        self._note(number, new, self.model._asked(self.model.active[number], ids, asked, self.cache, states))

    def _note(self, number: int, new: dict[int, list[int]], told: Told) -> None:
        """Keep what a member said of the first position that is not firm, and of all behind it."""
        keep, rows = told.log_probs.shape[1], self.held[number].rows
        log_probs = told.log_probs.flatten(0, 1).unbind()
        states = None if told.state is None else told.state.flatten(0, 1).unbind()
        for at, row in enumerate(rows):
            end = len(self.texts[row])
            for position in range(max(self.firm[row], end - len(new.get(row, ())) + 1), end + 1):
                place = (at + 1) * keep - 1 - (end - position)
                self.told[number][row][position] = Told(log_probs[place], None if states is None else states[place])

    def said(self, number: int, cells: Sequence[Cell]) -> Told:
        """What an active member has said: `[cells, vocabulary]`."""
        found = [self.told[number][row][position] for row, position in cells]
        states = [each.state for each in found if each.state is not None]
        return Told(torch.stack([each.log_probs for each in found]), torch.stack(states) if states else None)

    def ends(self, number: int) -> list[Cell]:
        """Where an active member can add a draft: behind the texts that it has read and that may become longer."""
        cells = [(row, len(self.texts[row])) for row in self.rows if len(self.texts[row]) < self.limits[row]]
        return [(row, end) for row, end in cells if end in self.told[number][row]]

    def draft(self, number: int, cells: Sequence[Cell], tokens: Sequence[int], probs: torch.Tensor | None) -> None:
        """Adds an active member's `tokens` at these ends, drawn from `probs [cells, vocabulary]`."""
        for place, ((row, _), token) in enumerate(zip(cells, tokens, strict=True)):
            self.texts[row].append(token)
            self.by[row].append(number)
            if probs is not None:
                self.drawn[row].append(probs[place])

    def known(self, row: int) -> int:
        """Of how many positions of a row, from the first that is not firm, all members have spoken: drafts, and at most
        one behind them."""
        stop = min(held.count(row) for held in self.held)
        return max(0, min(stop + 1, self.limits[row]) - self.firm[row])

    def judged(self, row: int, count: int) -> Judged:
        """What is to be judged of a row where `count` of its positions are known."""
        drafts, firm = self.by[row][:count], self.firm[row]
        return Judged(self.texts[row][firm : firm + len(drafts)], self.drawn[row][:count], count > len(drafts))

    def settle(self, row: int, verdict: Verdict) -> list[int]:
        """Drops the drafts of a row that were not kept; returns the tokens that are firm now."""
        before, firm = self.firm[row], self.firm[row] + verdict.kept
        self.firm[row] = firm + (verdict.instead is not None)
        if verdict.instead is None:
            self.by[row], self.drawn[row] = self.by[row][verdict.kept :], self.drawn[row][verdict.kept :]
            self._forget(row, range(before, firm))
        else:
            self.by[row], self.drawn[row], self.texts[row][firm:] = [], [], [verdict.instead]
            for held in self.held:
                held.forget(row, firm)
            self._forget(row)
        return self.texts[row][before : self.firm[row]]

    def _forget(self, row: int, positions: Iterable[int] | None = None) -> None:
        """What was said of these positions of a row, or of all, is of no more use."""
        for told in self.told:
            for position in list(told[row]) if positions is None else positions:
                del told[row][position]

    def leave(self, row: int) -> None:
        """A row is finished."""
        self.rows.remove(row)
        self._forget(row)
