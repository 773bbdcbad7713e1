"""A base and a LoRA adapter read as one checkpoint: a piece of a changed weight is worked out when it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from graft.checkpoint import Headers, TensorHeader, TensorReader
from graft.errors import CannotCombine
from graft.lora import Factors, Lora, read_lora, stands_for

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 20
"""Elements that are looked at together."""
HELD = 4
"""Pairs of factors kept in memory: tensors are worked on one after the other."""


@dataclass(frozen=True)
class Virtual(TensorHeader):
    """A tensor that is worked out in float32, and stored in another type by a model that is made from it."""

    kept_as: str = "F32"

    @property
    def stored(self) -> str:
        """The type of the base's tensor."""
        return self.kept_as


def adapted_headers(lora: Lora, base: Headers, tied: dict[str, str]) -> Headers:
    """The tensors of a base with an adapter on it. `tied` are names that the base has for a tensor it stores once.

    Raises CannotCombine where the adapter changes what the base does not have, or has in another shape.
    """
    made = dict(base)
    for name, own in lora.whole.items():
        made[stands_for(name, base) or name] = lora.headers[own]
    for name, factors in lora.changes.items():
        there = stands_for(name, made)
        if there is None and name in tied:
            # a change of an output matrix that the base ties to its embeddings: from here on the two are apart
            there = name
            made[name] = replace(base[tied[name]], name=name)
        if there is None:
            raise CannotCombine(f"{lora.folder}: the adapter changes {name}, which its base does not have")
        header = made[there]
        _oriented(lora, factors, header)
        made[there] = Virtual(there, "F32", header.shape, header.file, header.start, header.end, header.dtype)
    return made


def _oriented(lora: Lora, factors: Factors, header: TensorHeader) -> bool:
    """Whether the transpose of B A has the shape of the weight; both may, then the configuration says."""
    plain = (lora.headers[factors.b].shape[0], lora.headers[factors.a].shape[1])
    if plain == header.shape and not (factors.transposed and plain[0] == plain[1]):
        return False
    if plain[::-1] == header.shape:
        return True
    raise CannotCombine(
        f"{lora.folder}: the adapter changes {header.name} by {list(plain)}, its base has {list(header.shape)}: it was "
        "trained on another model"
    )


class AdaptedReader(TensorReader):
    """Reads pieces of base + s · B A, in float32. The base's files and the adapter's stay as they are."""

    def __init__(self, folder: Path, base: Path, tied: dict[str, str]):
        self.folder = Path(folder).resolve()
        self.lora = read_lora(folder)
        self.base = TensorReader(base)
        self.own = TensorReader(folder)
        self.headers = adapted_headers(self.lora, self.base.headers, tied)
        self._under = {stands_for(name, self.headers) or name: found for name, found in self.lora.changes.items()}
        self._whole = {stands_for(name, self.headers) or name: own for name, own in self.lora.whole.items()}
        self._tied = tied
        self._held: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = Lock()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the tensor from byte `start`: float32 numbers where the adapter changes it."""
        import torch

        header = self.headers[name]
        if not isinstance(header, Virtual):
            reader = self.own if header.file.parent == self.lora.folder else self.base
            reader.read_into(header.name, start, buffer)
            return
        first, count = start // 4, len(buffer) // 4
        into = torch.frombuffer(buffer, dtype=torch.float32, count=count)
        into.copy_(self._before(name, first, count))
        into.add_(self._product(name, first, count))

    def _before(self, name: str, start: int, count: int) -> Tensor:
        """The weight without the change: the adapter's own copy where it has one."""
        if name in self._whole:
            return self.own.read(self._whole[name], start, count)
        return self.base.read(name if name in self.base.headers else self._tied[name], start, count)

    def change(self, name: str, start: int, count: int) -> Tensor | None:
        """`count` elements from `start` of what the adapter adds to its base, flat float32; None where that is not
        s · B A: where it leaves the tensor as it is, or has a copy of its own."""
        if name not in self._under or name in self._whole:
            return None
        return self._product(name, start, count)

    def _product(self, name: str, start: int, count: int) -> Tensor:
        left, right = self._factors(name)
        width = right.shape[1]
        top, bottom = start // width, -(-(start + count) // width)
        rows = left[top:bottom] @ right
        return rows.reshape(-1)[start - top * width :][:count]

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`left` [rows, r] with the scale in it and `right` [r, columns], in the orientation of the stored weight."""
        with self._lock:
            if name not in self._held:
                factors = self._under[name]
                a, b = (self.own.read(part).float() for part in (factors.a, factors.b))
                b.mul_(factors.scale)
                turned = _oriented(self.lora, factors, self.headers[name])
                self._held[name] = (a.T.contiguous(), b.T.contiguous()) if turned else (b, a)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            return self._held[name]

    def origin(self, name: str) -> Path:
        """The file to look at where the tensor's values are no numbers: the adapter's, if what it adds is none."""
        header = self.headers[name]
        if name not in self._under:
            return header.file
        sums = (self._product(name, at, min(PIECE, header.count - at)).sum() for at in range(0, header.count, PIECE))
        return (
            header.file if all(bool(each.isfinite()) for each in sums) else self.lora.headers[self._under[name].a].file
        )

    def close(self) -> None:
        """Close the files of both."""
        self.base.close()
        self.own.close()
