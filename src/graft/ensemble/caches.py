"""The common cache of an ensemble: seen by one member, and the text in it for members that read it later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache


class CacheView(Cache):
    """A member's span of the ensemble's cache: the very same layer objects."""

    def __init__(self, whole: Cache, start: int, stop: int):
        super().__init__(layers=whole.layers[start:stop])


@dataclass(frozen=True)
class Text:
    """All that has been read: `ids [batch, length]` and `positions [batch, length]` (-1 where none were given)."""

    ids: torch.Tensor
    positions: torch.Tensor

    def since(self, seen: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The ids and positions of what comes behind the first `seen` tokens."""
        positions = self.positions[:, seen:]
        return self.ids[:, seen:], None if (positions < 0).any() else positions


def grown_text(cache: Cache, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> Text:
    """The text in the cache's first layer with `input_ids [batch, new]` behind it, where it stays.

    A layer like the others, so that beams, cropping and repeating act on it as on them.
    """
    length = int(cache.get_seq_length(0)) + input_ids.shape[1]
    positions = torch.full_like(input_ids, -1) if position_ids is None else position_ids.expand_as(input_ids)
    ids, places = cache.update(input_ids[:, None, :, None], positions[:, None, :, None], 0)
    return Text(ids[:, 0, :length, 0], places[:, 0, :length, 0])
