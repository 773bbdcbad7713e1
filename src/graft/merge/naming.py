"""One name for one tensor: parents that were saved without a head, or by old programs, call theirs otherwise. Light.

`transformers` reads both `h.0.ln_1.weight` and `transformer.h.0.ln_1.weight`, and tells `LayerNorm.gamma` from no other
name: a base as it was published and what was tuned from it often differ in nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.checkpoint import FLOATS, Headers, TensorHeader, TensorReader

if TYPE_CHECKING:
    from torch import Tensor

OLD_ENDS = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
"""How names of old checkpoints end, whatever the architecture, and how those of new ones do."""
DEAD = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|(?:attn|attention)\.(?:masked_)?bias)$")
"""Buffers that old versions of `transformers` stored, and that no version reads: rotary frequencies, causal masks (as
wide as they are high) and the number that stands for what they hide."""
Names = Mapping[str, str]
"""Name in the files → what the tensor is called here; only those that differ."""


def alike(stored: Mapping[str, Collection[str]]) -> dict[str, Names]:
    """For each parent what its tensors are called, so that all call the same tensor the same; by their names alone."""
    sets = {parent: frozenset(names) for parent, names in stored.items()}
    kinds = list(dict.fromkeys(sets.values()))
    called = {own: next(filter(None, (_called(own, other) for other in kinds if other != own)), {}) for own in kinds}
    return {parent: called[own] for parent, own in sets.items()}


def _called(own: Set[str], others: Set[str]) -> Names:
    """The names of one parent that another one has longer, or newer."""
    prefix = _prefix(own, others)
    made = {name: _one(name, prefix, others) for name in own - others}
    # what stands beside tensors that are called otherwise is so too, though no other parent has it
    moved = {name.partition(".")[0] for name, called in made.items() if called in others}
    made |= {n: prefix + c for n, c in made.items() if c not in others and n.partition(".")[0] in moved}
    return {name: called for name, called in made.items() if called != name}


def _one(name: str, prefix: str, others: Set[str]) -> str:
    newer = _newer(name)
    return next((called for called in (newer, prefix + name, prefix + newer) if called in others), newer)


def _newer(name: str) -> str:
    end = next((end for end in OLD_ENDS if name.endswith(end)), "")
    return name.removesuffix(end) + OLD_ENDS[end] if end else name


def _prefix(own: Set[str], others: Set[str]) -> str:
    """What others begin the names of layers with, before what one has of them; empty where there is no such thing."""
    inside = sorted(name for name in own - others if any(part.isdigit() for part in name.split(".")))
    for end in (f".{_newer(name)}" for name in inside):
        longer = sorted(name for name in others if name.endswith(end))
        if longer and longer[0] not in own:
            return longer[0].removesuffix(end) + "."
    return ""


def is_dead(header: TensorHeader) -> bool:
    """Whether a tensor is a buffer that no model reads; a bias of that name is a vector."""
    if not DEAD.search(header.name) or header.dtype not in FLOATS:
        return False
    shape = header.shape
    return header.name.endswith("inv_freq") or not shape or (len(shape) == 4 and shape[2] == shape[3])


def renamed(headers: Headers, names: Names) -> Headers:
    """The headers under the names that the tensors have here."""
    return {names.get(t, t): replace(header, name=names.get(t, t)) for t, header in headers.items()}


class Placed(TensorReader):
    """The tensors of a parent under other names. `places`: name → the one that it has there."""

    def __init__(self, reader: TensorReader, places: Mapping[str, str], *, owns: bool = False):
        self.folder, self.reader, self.places, self._owns = reader.folder, reader, places, owns
        self.headers = {name: replace(reader.headers[there], name=name) for name, there in places.items()}

    @property
    def base(self) -> Any:
        """The reader of the model that an adapter stands on."""
        return getattr(self.reader, "base", None)

    def change(self, name: str, start: int, count: int) -> Tensor | None:
        """What an adapter adds to a tensor."""
        return self.reader.change(self.places[name], start, count)  # type: ignore[attr-defined]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start`."""
        self.reader.read_into(self.places[name], start, buffer)

    def origin(self, name: str) -> Path:
        """The file to look at where the tensor's values are no numbers."""
        return self.reader.origin(self.places[name])

    def close(self) -> None:
        """Close the files, unless somebody else has opened them."""
        if self._owns:
            self.reader.close()
