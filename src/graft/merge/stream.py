"""One tensor of all parents, in float32, a cache-sized piece at a time, on all cores.

A method sees a `Tensors`: the tensor of one name in every parent. It may stream over the pieces as often as it needs to
(`map`) before it gives a `Combine`, which makes each piece of the output from the same piece of the inputs. Neither the
size of the model nor that of the tensor decides what is held in memory.

On an accelerator the same functions run on larger pieces: each thread reads one into pinned memory, works on it in a
stream of its own, and writes what comes back, so that reading and writing overlap with the others' arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from graft.checkpoint import TORCH_NAMES, WIDTH, Headers, TensorReader
from graft.errors import CannotCombine, CheckpointError
from graft.finite import finite
from graft.merge._workers import TOGETHER, Workers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 1 << 19
"""Elements of a piece: those of a few models, in float32, lie in the cores' caches, and the work on them takes longer
than the threads' waiting for each other between its steps."""
FAR_PIECE = 1 << 21
"""Elements of a piece on an accelerator: enough work to be worth a start of its kernels."""
COPIED = 1 << 22
"""Bytes of a piece of what is taken over as it is."""
KNOWN = frozenset({"BF16", "F16", "F32"})
"""Stored types that kernels read."""

R = TypeVar("R")


class Writer(Protocol):
    """Takes what is made, a piece at a time, in any order, from any thread."""

    headers: Headers

    def write(self, name: str, start: int, piece: memoryview | bytes) -> None:
        """Put `piece` at byte `start` of the tensor."""


@dataclass
class Piece:
    """A run of elements of one tensor. The tensors are the method's own: it may overwrite them."""

    start: int
    """Index of the first element in the flat tensor."""
    models: list[Tensor]
    """Flat, float32, one of each model, in the order of the settings."""
    base: Tensor | None = None
    """Flat, float32, where the method has a base."""
    changes: Sequence[Tensor | None] = ()
    """Deltas that are known as such, of adapters on this base; they are not worked out from the models."""

    def deltas(self) -> list[Tensor]:
        """The models minus the base, overwriting the models."""
        assert self.base is not None
        changes = self.changes or [None] * len(self.models)
        return [
            model.sub_(self.base) if change is None else change
            for model, change in zip(self.models, changes, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.models[0])


Combine = Callable[[Piece], "Tensor"]
"""Makes a piece of the output: flat, float32, as long as the piece."""


@dataclass(frozen=True)
class Source:
    """Where one parent keeps a tensor: its open files and the name it has there."""

    model: str
    reader: TensorReader
    name: str
    short: str = ""
    """What the parent is called among the others, without the folders above it."""

    @property
    def drawn_by(self) -> str:
        """What random draws for this parent belong to: the same for a path and for the name at its end."""
        return self.short or self.model

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """`count` elements from element `start`, flat; the whole tensor in its shape where `count` is None. float32.

        Raises CheckpointError, naming model, tensor and file, for NaN and Inf.
        """
        return self.checked(self.reader.read(self.name, start, count).float())

    def checked(self, values: Tensor) -> Tensor:
        """What was read of the tensor. Raises CheckpointError, naming model, tensor and file, for NaN and Inf."""
        if finite(values):
            return values
        raise CheckpointError(
            f"{self.model}: NaN or Inf in {self.name} ({self.reader.origin(self.name)}): "
            "train or download it anew; a merge would carry it on"
        )


@dataclass(frozen=True)
class Bits:
    """A piece of all parents as it is stored, one type for all, for kernels."""

    start: int
    """Index of the first element in the flat tensor."""
    count: int
    models: int
    base: bool
    """Whether the first row is the base's."""
    stored: str
    """The type, as safetensors names it."""
    values: np.ndarray
    """[base + models, count] whole numbers, in memory that is used again."""
    workers: Workers

    def scratch(self, slot: str, dtype: Any, count: int) -> np.ndarray:
        """Memory of this thread."""
        return self.workers.array(("scratch", slot), dtype, count)


ByKernel = Callable[[Bits, str, np.ndarray], bool]
"""(piece, stored type of what is made, where it goes) → whether it was made: a rule's `by_kernel`, where it has one."""


@dataclass(frozen=True)
class Tensors:
    """The tensor of one name in every parent."""

    name: str
    shape: tuple[int, ...]
    models: Sequence[Source]
    base: Source | None
    workers: Workers
    seed: int = 0
    by_rows: bool = False
    """Pieces hold whole rows (of the last dimension)."""
    survey: Any = None
    """What the method measured over all tensors before it began with the first."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of a row; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def piece(self) -> int:
        """Elements of a piece."""
        length = PIECE if self.workers.near else FAR_PIECE
        return max(length // self.row, 1) * self.row if self.by_rows and self.row else length

    def spans(self) -> list[tuple[int, int]]:
        """(first element, number of elements) of every piece, in order."""
        return [(start, min(self.piece, self.count - start)) for start in range(0, self.count, self.piece)]

    def map(self, function: Callable[[Piece], R]) -> list[R]:
        """What `function` gives for every piece, in order; pieces are read and worked on in parallel."""
        return self.workers.map(lambda span: function(self.read(*span)), self.spans(), TOGETHER)

    @cached_property
    def sources(self) -> list[Source]:
        """The base, where there is one, and the models."""
        return [*([self.base] if self.base is not None else []), *self.models]

    @cached_property
    def stored(self) -> str | None:
        """The type that all parents are stored in, where kernels can read it; an adapter's model is stored nowhere."""
        types = {source.reader.headers[source.name].dtype for source in self.sources}
        adapted = any(getattr(source.reader, "base", None) is not None for source in self.sources)
        (stored,) = types if len(types) == 1 else (None,)
        return stored if self.workers.near and stored in KNOWN and not adapted else None

    def bits(self, start: int, count: int) -> Bits | None:
        """One piece of all parents as it is stored; None where kernels cannot read it."""
        if (stored := self.stored) is None:
            return None
        rows, width = len(self.sources), WIDTH[stored]
        values = self.workers.array("bits", np.dtype(f"u{width}"), rows * count).reshape(rows, count)
        for source, row in zip(self.sources, values, strict=True):
            source.reader.read_into(source.name, start * width, row.view(np.uint8).data)
        return Bits(start, count, len(self.models), self.base is not None, stored, values, self.workers)

    def read(self, start: int, count: int) -> Piece:
        """One piece of all parents. Raises CheckpointError, naming model and tensor, for NaN and Inf."""
        base = self._read(self.base, "base", start, count) if self.base is not None else None
        changes = [self._change(source, start, count) for source in self.models]
        models = [
            self._read(source, index, start, count) if change is None else self._on_base(index, base, change)
            for index, (source, change) in enumerate(zip(self.models, changes, strict=True))
        ]
        return Piece(start, models, base, changes)

    def _change(self, source: Source, start: int, count: int) -> Tensor | None:
        """What an adapter adds to the base of this merge; None for all other parents."""
        on = getattr(source.reader, "base", None)
        if on is None or self.base is None or self.base.reader.folder != on.folder:
            return None
        change = source.reader.change(source.name, start, count)  # type: ignore[attr-defined]
        return change if change is None else source.checked(change).to(self.workers.device)

    def _on_base(self, slot: object, base: Tensor | None, change: Tensor) -> Tensor:
        assert base is not None
        if not self.workers.near:
            return base + change
        _, values = self.workers.buffer((slot, "float32"), base.dtype, len(base))
        return values.copy_(base).add_(change)

    def _read(self, source: Source, slot: object, start: int, count: int) -> Tensor:
        stored = source.reader.headers[source.name].dtype
        dtype = _torch_type(stored)
        into, raw = self.workers.buffer((slot, "stored"), dtype, count)
        source.reader.read_into(source.name, start * WIDTH[stored], into)
        return source.checked(self.workers.floats(raw, slot))

    def write(self, combine: Combine, writer: Writer) -> None:
        """Make every piece and put it into its place, cast once. Raises CheckpointError where NaN or Inf come out."""
        stored = writer.headers[self.name].dtype
        by_kernel: ByKernel | None = getattr(combine, "by_kernel", None)

        def make(span: tuple[int, int]) -> None:
            made = self._made(by_kernel, span, stored) if by_kernel is not None else None
            made = self._plainly(combine, span, stored) if made is None else made
            writer.write(self.name, span[0] * WIDTH[stored], made)

        self.workers.map(make, self.spans(), TOGETHER)

    def _made(self, by_kernel: ByKernel, span: tuple[int, int], stored: str) -> memoryview | None:
        """The bytes that a kernel makes of a piece; None where it cannot, or met NaN or Inf."""
        bits = self.bits(*span) if stored in KNOWN else None
        if bits is None:
            return None
        out = self.workers.array("made", np.dtype(f"u{WIDTH[stored]}"), span[1])
        return out.view(np.uint8).data if by_kernel(bits, stored, out) else None

    def _plainly(self, combine: Combine, span: tuple[int, int], stored: str) -> memoryview:
        made = combine(self.read(*span))
        bytes_, cast = self.workers.buffer("out", _torch_type(stored), span[1])
        if not self.workers.store(made, cast):
            raise CheckpointError(f"{self.name}: the merge gives values that {stored} cannot hold")
        return bytes_


def _torch_type(stored: str) -> torch.dtype:
    import torch

    return getattr(torch, TORCH_NAMES[stored])


def copy_whole_numbers(tensors: Tensors, writer: Writer) -> None:
    """Buffers, which have no mean, are taken over as they are stored.

    Raises CannotCombine where they are not the same in all parents.
    """
    sources = tensors.sources
    headers = [source.reader.headers[source.name] for source in sources]
    size = headers[0].end - headers[0].start
    same = len({header.dtype for header in headers}) == 1
    for start in range(0, size, COPIED):
        pieces = [bytearray(min(COPIED, size - start)) for _ in sources]
        for source, piece in zip(sources, pieces, strict=True):
            source.reader.read_into(source.name, start, memoryview(piece))
        if not same or any(piece != pieces[0] for piece in pieces):
            raise CannotCombine(
                f"{tensors.name} holds whole numbers that differ between {', '.join(s.model for s in sources)}: "
                "they have no mean"
            )
        writer.write(tensors.name, start, memoryview(pieces[0]))
