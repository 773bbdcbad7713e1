"""Drafts are drawn, and kept or replaced so that what is written has the ensemble's own distribution.

A draft of a member's probability q is kept with probability min(1, p/q) of the ensemble's p; else a token is drawn from
what p has above q (Leviathan et al. 2023). Greedily it is kept where it is the ensemble's best.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Judged:
    """Of a row the drafts to be judged: their `tokens`, the probabilities `[vocabulary]` each that they were `drawn`
    from (none where greedy), and whether behind them a token is to be written (`free`)."""

    tokens: Sequence[int]
    drawn: Sequence[torch.Tensor]
    free: bool

    @property
    def cells(self) -> int:
        """Positions that the ensemble has spoken of."""
        return len(self.tokens) + self.free


@dataclass(frozen=True)
class Verdict:
    """How many of a row's drafts are `kept`, and the token `instead` of the next one or in the free place behind all;
    None where all were kept and no place is free."""

    kept: int
    instead: int | None


@dataclass(frozen=True)
class Drawing:
    """Greedy where `temperature` is None."""

    temperature: float | None
    generator: torch.Generator | None

    def draw(self, log_probs: torch.Tensor) -> tuple[list[int], torch.Tensor | None]:
        """A token for each row of `[rows, vocabulary]`, and the probabilities it was drawn from."""
        if self.temperature is None:
            return log_probs.argmax(-1).tolist(), None
        probs = self._probs(log_probs)
        return self._sampled(probs), probs

    def agreement(self, told: Sequence[torch.Tensor], mixed: torch.Tensor) -> list[float]:
        """Which share of each member's drafts would be kept, given what it and the ensemble say, `[cells, vocabulary]`
        each."""
        if self.temperature is None:
            best = mixed.argmax(-1)
            return [float((each.argmax(-1) == best).float().mean()) for each in told]
        ours = self._probs(mixed)
        return [float(torch.minimum(ours, self._probs(each)).sum(-1).mean()) for each in told]

    def judge(self, rows: Sequence[Judged], mixed: torch.Tensor) -> list[Verdict]:
        """On the drafts of each row, given what the ensemble says of them and of the free places, row behind row:
        `mixed [cells, vocabulary]`."""
        firsts = [0, *itertools.accumulate(each.cells for each in rows)]
        if self.temperature is None:
            best = mixed.argmax(-1).tolist()
            kept = _kept(rows, [best[cell] == token for cell, token in _drafts(rows)])
            triples = zip(rows, kept, firsts, strict=False)
            return [
                Verdict(count, best[first + count] if count < each.cells else None) for each, count, first in triples
            ]
        return self._judged(rows, firsts, self._probs(mixed))

    def _judged(self, rows: Sequence[Judged], firsts: Sequence[int], ours: torch.Tensor) -> list[Verdict]:
        """The same of drafts that were drawn, where the ensemble gives `ours [cells, vocabulary]`."""
        drafts = list(_drafts(rows))
        right: list[bool] = []
        if drafts:
            places = torch.tensor(drafts, device=ours.device)
            theirs = torch.stack([each for row in rows for each in row.drawn])
            given = theirs.gather(-1, places[:, 1:])[:, 0]
            chance = torch.rand(len(drafts), generator=self.generator, device=ours.device)
            right = (chance * given < ours[places[:, 0], places[:, 1]]).tolist()
        kept = _kept(rows, right)
        asked = [(row, count) for row, count in enumerate(kept) if count < rows[row].cells]
        rest = ours[[firsts[row] + count for row, count in asked]]
        for place, (row, count) in enumerate(asked):
            if count < len(rows[row].tokens):
                above = (rest[place] - rows[row].drawn[count]).clamp(min=0)
                rest[place] = above if float(above.sum()) > 0 else rest[place]
        instead = dict(zip((row for row, _ in asked), self._sampled(rest) if asked else (), strict=True))
        return [Verdict(count, instead.get(row)) for row, count in enumerate(kept)]

    def _probs(self, log_probs: torch.Tensor) -> torch.Tensor:
        assert self.temperature is not None
        return (log_probs / self.temperature).softmax(-1)

    def _sampled(self, probs: torch.Tensor) -> list[int]:
        return torch.multinomial(probs, 1, generator=self.generator)[:, 0].tolist()


def _drafts(rows: Sequence[Judged]) -> Iterator[tuple[int, int]]:
    """The cell and the token of every draft."""
    first = 0
    for each in rows:
        yield from enumerate(each.tokens, start=first)
        first += each.cells


def _kept(rows: Sequence[Judged], right: Sequence[bool]) -> list[int]:
    """How many drafts of each row come before the first that is not right."""
    found, told = [], iter(right)
    for each in rows:
        own = [next(told) for _ in each.tokens]
        found.append([*own, False].index(False))
    return found
