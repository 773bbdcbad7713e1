"""What a model over bytes keeps between the steps of decoding: of every row, each member's sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from graft.ensemble.byte_level.cover import State
from graft.ensemble.byte_level.forest import Forest
from graft.errors import RequestError


class Read(NamedTuple):
    """How far a member has read a row: the `state` behind it (None: it has not begun), and ids that it has `missed`."""

    state: State | None = None
    missed: tuple[int, ...] = ()


class ByteCache(Cache):
    """`rows`: of each row how far the members have read, which nothing changes once it is made, so that beams are
    reordered by choosing among them; `forests`: where each member's sequences lie; `length`: ids of a row, padding
    included."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: list[tuple[Read, ...]] = []
        self.forests: list[Forest] = []
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Ids that it has seen in each row."""
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self._choose(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self._choose([row for row in range(len(self.rows)) for _ in range(repeats)])

    def _choose(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def reset(self) -> None:
        """As when it was made."""
        self.rows, self.forests, self.length = [], [], 0

    def crop(self, *_: int) -> None:
        """Refused: what was dropped on the way cannot be brought back."""
        raise RequestError("a cache over bytes cannot be cropped: decode without an assistant")

    @property
    def is_croppable(self) -> bool:
        """Never."""
        return False
