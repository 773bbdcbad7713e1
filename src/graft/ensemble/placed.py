"""A cache in which every row of a batch is as long as its own text.

Each row begins in the first column, and a token is written into the column of its position: over a draft that was not
kept, so that nothing is ever moved. Which columns a token sees is said by a mask `[rows, 1, tokens, columns]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

TYPES = {
    "cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2",
    "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
"""Models that take a mask of four dimensions as it is, or one for each type of their layers where their configuration
has types, and know positions from `position_ids` alone. A trial on a short text could not tell: windows are longer."""


def can_be_placed(member: Any) -> bool:
    """Whether a member can read with such a cache."""
    config = member.config
    plain = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
    return plain and config.model_type in TYPES


class Masks(NamedTuple):
    """What a member's masks depend on: eager attention, types of its layers where it takes a mask for each, the window
    of those that slide, the device."""

    eager: bool
    types: frozenset[str] | None
    window: int | None
    device: torch.device


def masks_of(member: Any) -> Masks:
    """Those of a member that can be placed."""
    config = member.config
    # asked of the class: a file may name types to a model that knows of none
    types = frozenset(config.layer_types) if hasattr(type(config), "layer_types") else None
    window = getattr(config, "sliding_window", None)
    return Masks(config._attn_implementation == "eager", types, window, next(member.parameters()).device)


class Places:
    """Where in the cache the tokens stand that a member reads next, and what they see. Its layers look here, and those
    of other members with the same `masks`."""

    def __init__(self, masks: Masks):
        self.masks, self.device = masks, masks.device
        self.seen = 0
        self.given: torch.Tensor | None = None
        self._flat: dict[int, torch.Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        return self  # a copy of a layer stands in the same cache and looks here as well

    def go_to(self, positions: torch.Tensor, stop: int, seen: int) -> Any:
        """The tokens at `positions [rows, tokens]` before `stop` come next, below 0: none; so many columns were read
        before. Returns the mask, None where nothing was read before: then each token sees those before it as in any
        other cache."""
        if positions is not self.given:
            self.given, self.positions, self._flat = positions, positions.to(self.device), {}
            self.stop, self.columns = stop, 1 << stop.bit_length()  # more than stop: the last takes what is no token
            self.seen = seen
            self.mask = self._mask(self.positions.clamp(min=0)[:, None, :, None]) if seen else None
        return self.mask

    def flat(self, heads: int) -> torch.Tensor:
        """Where the tokens stand in `[rows, heads, columns]`, as one long list."""
        if heads not in self._flat:
            rows, tokens = self.positions.shape
            begin = torch.arange(rows * heads, device=self.device).view(rows, heads, 1) * self.columns
            columns = self.positions.clamp(min=-1) % self.columns
            self._flat[heads] = (begin + columns[:, None]).view(rows * heads * tokens)
        return self._flat[heads]

    def _mask(self, positions: torch.Tensor) -> Any:
        columns, window = torch.arange(self.stop, device=self.device), self.masks.window
        full = columns <= positions
        slid = full if window is None else full & (columns > positions - window)
        if self.masks.types is None:
            return self._made(slid)
        return {each: self._made(slid if each == "sliding_attention" else full) for each in self.masks.types}

    def _made(self, mask: torch.Tensor) -> torch.Tensor:
        if not self.masks.eager:
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


class PlacedLayer(DynamicLayer):
    """A layer whose `keys` and `values` are `[rows, heads, columns, channels]`, some of them not written yet."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values `[rows, heads, tokens, channels]`; returns those of all columns so far."""
        self.keys, self.values = self._written(self.keys, key_states), self._written(self.values, value_states)
        self.is_initialized = True
        if not self.places.seen:
            return key_states, value_states
        return self.keys[:, :, : self.places.stop], self.values[:, :, : self.places.stop]

    def _written(self, held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        rows, heads, _, channels = new.shape
        columns = self.places.columns
        if held is None or held.shape[2] != columns:
            held = _with_columns(held, new.new_zeros(rows, heads, columns, channels))
        held.view(-1, channels).index_copy_(0, self.places.flat(heads), new.reshape(-1, channels))
        return held

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        """Columns that were read before."""
        return self.places.seen


def _with_columns(held: torch.Tensor | None, wider: torch.Tensor) -> torch.Tensor:
    """What is `held [rows, heads, columns, channels]`, in zeros with another number of columns."""
    if held is not None:
        both = min(held.shape[2], wider.shape[2])
        wider[:, :, :both] = held[:, :, :both]
    return wider
