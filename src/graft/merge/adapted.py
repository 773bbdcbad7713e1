"""A base and an adapter read as one checkpoint: a piece of a changed weight is worked out when it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from graft.checkpoint import Headers, TensorHeader, TensorReader
from graft.errors import CannotCombine
from graft.lora import Change, Factors, Lora, LoraReader, Rescale, Shift, stands_for

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 20
"""Elements that are looked at together."""
HELD = 8
"""Changes whose tensors are kept in memory: tensors are worked on one after the other."""


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
    for name, changes in lora.changes.items():
        there = stands_for(name, made)
        if there is None and name in tied:
            # a change of an output matrix that the base ties to its embeddings: from here on the two are apart
            there = name
            made[name] = replace(base[tied[name]], name=name)
        if there is None:
            raise CannotCombine(f"{lora.folder}: the adapter changes {name}, which its base does not have")
        header = made[there]
        for change in changes:
            _check_shape(lora, change, header)
        made[there] = Virtual(there, "F32", header.shape, header.file, header.start, header.end, header.dtype)
    return made


def _check_shape(lora: Lora, change: Change, header: TensorHeader) -> None:
    """Raises CannotCombine for a change of another shape than the tensor's."""
    if isinstance(change, Factors):
        _oriented(lora, change, header)
        return
    found, axis = lora.headers[change.own].shape, change.axis if isinstance(change, Rescale) else 0
    if found != header.shape[axis : axis + 1] or (isinstance(change, Shift) and len(header.shape) > 1):
        raise _other_model(lora, header, found)


def _other_model(lora: Lora, header: TensorHeader, found: Sequence[int]) -> CannotCombine:
    return CannotCombine(
        f"{lora.folder}: the adapter changes {header.name} by {list(found)}, its base has {list(header.shape)}: it was "
        "trained on another model"
    )


def _oriented(lora: Lora, factors: Factors, header: TensorHeader) -> bool:
    """Whether the transpose of B A has the shape of the weight; both may, then the configuration says."""
    plain = (lora.headers[factors.b].shape[0], lora.headers[factors.a].shape[1])
    if plain == header.shape and not (factors.transposed and plain[0] == plain[1]):
        return False
    if plain[::-1] == header.shape:
        return True
    raise _other_model(lora, header, plain)


def _product(left: Tensor, right: Tensor) -> Callable[[slice], Tensor]:
    return lambda rows: left[rows] @ right


def _repeated(vector: Tensor, axis: int) -> Callable[[slice], Tensor]:
    """Rows of a matrix that has `vector` in each column (axis 0) or in each row (1)."""
    return lambda rows: vector[rows, None] if axis == 0 else vector[None]


class AdaptedReader(TensorReader):
    """Reads pieces of a base with the changes of an adapter, in float32. The base's files and the adapter's stay as
    they are."""

    def __init__(self, lora: Lora, base: Path, tied: dict[str, str]):
        self.folder = lora.folder.resolve()
        self.lora = lora
        self.base = TensorReader(base)
        self.own = LoraReader(lora)
        self.headers = adapted_headers(self.lora, self.base.headers, tied)
        self._under = {stands_for(name, self.headers) or name: found for name, found in self.lora.changes.items()}
        self._whole = {stands_for(name, self.headers) or name: own for name, own in self.lora.whole.items()}
        self._tied = tied
        self._held: OrderedDict[tuple[str, Change], tuple[Tensor, ...]] = OrderedDict()
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
        self._apply(name, first, into)

    def _before(self, name: str, start: int, count: int) -> Tensor:
        """The weight without the change: the adapter's own copy where it has one."""
        if name in self._whole:
            return self.own.read(self._whole[name], start, count)
        return self.base.read(name if name in self.base.headers else self._tied[name], start, count)

    def change(self, name: str, start: int, count: int) -> Tensor | None:
        """`count` elements from `start` of what the adapter adds to its base, flat float32; None where that is no sum
        of factors and shifts: where it leaves the tensor as it is, multiplies it, or has a copy of its own."""
        import torch

        changes = self._under.get(name, ())
        if not changes or name in self._whole or any(isinstance(change, Rescale) for change in changes):
            return None
        return self._apply(name, start, torch.zeros(count))

    def _apply(self, name: str, start: int, values: Tensor) -> Tensor:
        """Put the changes of the tensor's elements from `start` on `values`, flat float32, in place."""
        for change in self._under[name]:
            found = self._tensors(name, change)
            if isinstance(change, Shift):
                values.add_(found[0][start : start + len(values)])
            elif isinstance(change, Factors):
                values.add_(self._rows(name, start, len(values), _product(*found)))
            else:
                values.mul_(self._rows(name, start, len(values), _repeated(found[0], change.axis)))
        return values

    def _rows(self, name: str, start: int, count: int, made: Callable[[slice], Tensor]) -> Tensor:
        """`count` elements from `start` of a matrix [rows, columns] of which `made` gives rows; a vector's have one."""
        shape = self.headers[name].shape
        width = shape[1] if len(shape) > 1 else 1
        top, bottom = start // width, -(-(start + count) // width)
        return made(slice(top, bottom)).expand(bottom - top, width).reshape(-1)[start - top * width :][:count]

    def _tensors(self, name: str, change: Change) -> tuple[Tensor, ...]:
        """What a change is worked out from, float32, with the scale in it: `left` [rows, r] and `right` [r, columns] in
        the orientation of the stored weight, or a vector."""
        with self._lock:
            if (name, change) not in self._held:
                self._held[name, change] = self._read(name, change)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            return self._held[name, change]

    def _read(self, name: str, change: Change) -> tuple[Tensor, ...]:
        if not isinstance(change, Factors):
            vector = self.own.read(change.own).float().mul_(change.scale)
            return (vector if isinstance(change, Shift) else vector.add_(1),)
        a, b = (self.own.read(part).float() for part in (change.a, change.b))
        b.mul_(change.scale)
        turned = _oriented(self.lora, change, self.headers[name])
        return (a.T.contiguous(), b.T.contiguous()) if turned else (b, a)

    def origin(self, name: str) -> Path:
        """The file to look at where the tensor's values are no numbers: the adapter's, if what it adds is none."""
        import torch

        header = self.headers[name]
        if name not in self._under:
            return header.file
        places = range(0, header.count, PIECE)
        sums = (self._apply(name, at, torch.zeros(min(PIECE, header.count - at))).sum() for at in places)
        own = next(iter(self.own.headers.values())).file
        return header.file if all(bool(each.isfinite()) for each in sums) else own

    def close(self) -> None:
        """Close the files of both."""
        self.base.close()
        self.own.close()
