"""What members said lately. Where the same two tokens come again in a row and a member that drafts expects the same as
then, the others probably do as well: it drafts what the ensemble would, which is kept more often than its own word.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from graft.ensemble.gate import Told

if TYPE_CHECKING:
    from graft.ensemble.causal import EnsembleForCausalLM

BEFORE = 2
"""Tokens that have to be the same. With one more, or one less, drafts of small models were kept as often."""
MOST = 1 << 25
"""Numbers that are remembered: what was said first is forgotten first."""

Key = tuple[int, ...]


class Place(NamedTuple):
    """Where something was said: `said [rows, columns, vocabulary]` by each member, there in a row and column."""

    said: Sequence[torch.Tensor]
    row: int
    column: int


class Recalled:
    """What active members said, by row and by the tokens before it; nothing in ensembles with a gate, whose weights
    would need more."""

    def __init__(self, model: EnsembleForCausalLM):
        self.model = model
        self._places: dict[Key, Place] = {}
        self._heard: deque[tuple[Sequence[torch.Tensor], list[Key]]] = deque()
        self._size = 0

    def hear(self, rows: Sequence[int], text: torch.Tensor, counts: Iterable[int], told: Sequence[Told]) -> None:
        """Members have `told [rows, columns]` each what comes before the last columns of `text [rows, BEFORE +
        columns - 1]`; of each row's last `counts` it is remembered."""
        if self.model.gate is not None:
            return
        said = [each.log_probs for each in told]
        columns, keys = said[0].shape[1], []
        if text.shape[1] < BEFORE + columns - 1:
            return
        for place, (row, tokens, count) in enumerate(zip(rows, text.tolist(), counts, strict=True)):
            for column in range(columns - count, columns):
                key = (row, *tokens[column : column + BEFORE])
                self._places[key] = Place(said, place, column)
                keys.append(key)
        self._heard.append((said, keys))
        self._size += sum(each.numel() for each in said)
        while self._size > MOST:
            self._forget()

    def _forget(self) -> None:
        said, keys = self._heard.popleft()
        self._size -= sum(each.numel() for each in said)
        for key in keys:
            if key in self._places and self._places[key].said is said:
                del self._places[key]

    def drafts(self, number: int, numbers: Sequence[int], text: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[rows, vocabulary]` to draft from behind `text [rows, BEFORE]` of these rows of the batch,
        where the member itself says `own`: mixed with what the others said when the same tokens came last, if they did
        and it expects the same as then."""
        found = [self._places.get((row, *tokens)) for row, tokens in zip(numbers, text.tolist(), strict=True)]
        if len(self.model.active) == 1 or not any(found):
            return own
        known = [row for row, place in enumerate(found) if place is not None]
        then = _then([place for place in found if place is not None], number)
        same = (then.argmax(-1) == own[known].argmax(-1)).tolist()
        rows = [row for row, alike in zip(known, same, strict=True) if alike]
        if not rows:
            return own
        places = [place for row in rows if (place := found[row]) is not None]
        every = [own[rows] if other == number else _then(places, other) for other in range(len(self.model.active))]
        mixed = self.model.combine(every, self.model.weights.to(own.device), self.model.options)
        mixed = torch.where(mixed[:, :1].isnan(), every[number], mixed)
        return own.index_copy(0, torch.tensor(rows, device=own.device), mixed)


def _then(places: Sequence[Place], number: int) -> torch.Tensor:
    """What a member said `[places, vocabulary]` there."""
    return torch.stack([place.said[number][place.row, place.column] for place in places])
