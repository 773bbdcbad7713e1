"""A base and an adapter read as one checkpoint: a piece of a changed weight is worked out when it is asked for.

Whatever an adapter does to a tensor, it comes down to steps of one kind: rows or columns times a vector, then a product
of low rank is added. What a step needs to know of the whole tensor is found in one pass over it, a few rows at a time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING

from graft.checkpoint import Headers, TensorHeader, TensorReader
from graft.errors import CannotCombine
from graft.lora import (
    Change,
    Factors,
    Fade,
    Lora,
    LoraReader,
    Mixing,
    Rescale,
    Shift,
    Stretch,
    Turning,
    stands_for,
)
from graft.machine import cores
from graft.merge._workers import TOGETHER

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 20
"""Elements that are looked at together."""
HELD = 2 * TOGETHER
"""Tensors for each core whose steps are kept in memory: more than a thread works on, which takes several at a time."""


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
    if isinstance(change, Turning):
        for factors in change.parts:
            _oriented(lora, factors, header)
    if isinstance(change, Mixing):
        shapes = lora.headers[change.factors.b].shape[0], lora.headers[change.factors.a].shape[1]
        if shapes != (header.shape[change.axis],) * 2:
            raise _other_model(lora, header, shapes)
    if isinstance(change, Shift | Rescale | Turning):
        vector = change.magnitude if isinstance(change, Turning) else change.own
        found, axis = lora.headers[vector].shape, 0 if isinstance(change, Shift) else change.axis
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


@dataclass(frozen=True)
class Step:
    """A tensor [rows, columns], or [rows], as it is stored, times `times`, plus `left @ right`; all float32."""

    times: Tensor | float | None = None
    axis: int = 0
    """Whether `times` has a number for each row (0) or column (1)."""
    left: Tensor | None = None
    """[rows, r]"""
    right: Tensor | None = None
    """[r, columns], columns of a vector being one."""


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
        self._held: OrderedDict[tuple[str, int], Step] = OrderedDict()
        self._room = HELD * cores() * max(map(len, self._under.values()), default=1)
        self._lock = Lock()
        self._finding: dict[str, RLock] = {}

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
        if not changes or name in self._whole or not all(isinstance(change, Factors | Shift) for change in changes):
            return None
        return self._apply(name, start, torch.zeros(count))

    def _apply(self, name: str, start: int, values: Tensor, until: int | None = None) -> Tensor:
        """Put the changes, or the first few, of the elements from `start` on `values`, flat float32, in place."""
        for place in range(len(self._under[name][:until])):
            step = self._step(name, place)
            if isinstance(step.times, float):
                values.mul_(step.times)
            elif step.times is not None:
                values.mul_(self._rows(name, start, len(values), _repeated(step.times, step.axis)))
            if step.left is not None and step.right is not None:
                values.add_(self._rows(name, start, len(values), _product(step.left, step.right)))
        return values

    def _rows(self, name: str, start: int, count: int, made: Callable[[slice], Tensor]) -> Tensor:
        """`count` elements from `start` of a matrix [rows, columns] of which `made` gives rows; a vector's have one."""
        width = self._width(name)
        top, bottom = start // width, -(-(start + count) // width)
        return made(slice(top, bottom)).expand(bottom - top, width).reshape(-1)[start - top * width :][:count]

    def _width(self, name: str) -> int:
        return math.prod(self.headers[name].shape[1:])

    def _step(self, name: str, place: int) -> Step:
        found = self._held.get((name, place))
        if found is not None:
            return found
        with self._lock:
            finding = self._finding.setdefault(name, RLock())
        # others' tensors are not waited for: finding a step may take a pass over this one
        with finding:
            found = self._held.get((name, place)) or self._found(name, place)
            with self._lock:
                self._held[name, place] = found
                while len(self._held) > self._room:
                    self._held.popitem(last=False)
        return found

    def _found(self, name: str, place: int) -> Step:
        import torch

        change = self._under[name][place]
        if isinstance(change, Fade):
            return Step(change.by)
        if isinstance(change, Factors):
            left, right = self._sides(change, name)
            return Step(left=left, right=right)
        if isinstance(change, Mixing):
            return self._mixing(name, place, change)
        if isinstance(change, Turning):
            return self._turning(name, change)
        if isinstance(change, Stretch):
            times = self._turning(stands_for(change.matrix, self.headers) or change.matrix, change.turning).times
            start = self._before(name, 0, self.headers[name].count)
            assert isinstance(times, torch.Tensor)
            return Step(times, left=((1 - times) * start)[:, None], right=torch.ones(1, 1))
        vector = self.own.read(change.own).float().mul_(change.scale)
        if isinstance(change, Shift):
            return Step(left=vector[:, None], right=torch.ones(1, 1))
        return Step(vector.add_(change.rest), change.axis)

    def _sides(self, factors: Factors, name: str) -> tuple[Tensor, Tensor]:
        """`left` and `right` of a product in the orientation of the stored weight, with the scale in it."""
        a, b = (self.own.read(part).float() for part in (factors.a, factors.b))
        b.mul_(factors.scale)
        turned = _oriented(self.lora, factors, self.headers[name])
        return (a.T.contiguous(), b.T.contiguous()) if turned else (b, a)

    def _mixing(self, name: str, place: int, change: Mixing) -> Step:
        """S + L (R S), or S + (S L) R: the product in brackets is that of the whole tensor."""
        import torch

        a, b = (self.own.read(part).float() for part in (change.factors.a, change.factors.b))
        b.mul_(change.factors.scale)
        left, right = (a.T, b.T) if change.factors.transposed else (b, a)
        keep = change.keep if change.keep != 1 else None
        blocks = self._blocks(name, place)
        if change.axis == 0:
            whole = torch.zeros(len(right), self._width(name))
            for top, rows in blocks:
                whole.addmm_(right[:, top : top + len(rows)], rows)
            return Step(keep, left=left, right=whole)
        return Step(keep, left=torch.cat([rows @ left for _, rows in blocks]), right=right)

    def _turning(self, name: str, change: Turning) -> Step:
        """(1 − w) W + w m / |W + ΔW| (W + ΔW), with the lengths of the rows of the frozen W."""
        import torch

        sides = [self._sides(factors, name) for factors in change.parts]
        left, right = torch.cat([one for one, _ in sides], 1), torch.cat([one for _, one in sides])
        squares = [
            rows.addmm_(left[top : top + len(rows)], right).square_().sum(1 - change.axis)
            for top, rows in self._blocks(name, 0)
        ]
        length = (torch.cat(squares) if change.axis == 0 else torch.stack(squares).sum(0)).sqrt_()
        factor = self.own.read(change.magnitude).float().div_(length).mul_(change.weight)
        if change.axis == 0:
            left = left * factor[:, None]
        else:
            right = right * factor
        return Step(factor + (1 - change.weight), change.axis, left, right)

    def _blocks(self, name: str, until: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of a tensor as its first changes leave it, float32; a vector's rows have one element."""
        height, width = self.headers[name].shape[0], self._width(name)
        for top in range(0, height, max(PIECE // width, 1)):
            count = min(max(PIECE // width, 1), height - top)
            rows = self._before(name, top * width, count * width).float()
            yield top, self._apply(name, top * width, rows, until).view(count, width)

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
