"""One tensor of all parents, in float32, a cache-sized piece at a time, on all cores.

A method sees a `Tensors`: the tensor of one name in every parent. It may stream over the pieces as often as it needs to
(`map`) before it gives a `Combine`, which makes each piece of the output from the same piece of the inputs. Neither the
size of the model nor that of the tensor decides what is held in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from graft.checkpoint import TORCH_NAMES, WIDTH, TensorReader, TensorWriter
from graft.errors import CheckpointError

PIECE = 1 << 17
"""Elements of a piece: those of a few models, in float32, lie in a core's cache."""

R = TypeVar("R")


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


Combine = Callable[[Piece], Tensor]
"""Makes a piece of the output: flat, float32, as long as the piece."""


@dataclass(frozen=True)
class Source:
    """Where one parent keeps a tensor: its open files and the name it has there."""

    model: str
    reader: TensorReader
    name: str


class Workers:
    """A thread a core, each with its own buffers, which are used again for every piece."""

    def __init__(self, threads: int | None = None):
        self.threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        self._own = threading.local()
        self._whole = threading.Lock()
        self._before = torch.get_num_threads()

    def map(self, function: Callable[[R], object], items: Sequence[R]) -> list:
        """The results in the order of the items; the first exception is raised after the others have stopped."""
        futures = [self._pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def buffer(self, slot: object, dtype: torch.dtype, count: int) -> tuple[memoryview, Tensor]:
        """`count` elements of this thread's buffer for `slot`, as bytes and as a tensor over the same memory."""
        held: dict[object, bytearray] = self._own.__dict__.setdefault("held", {})
        size = count * dtype.itemsize
        if len(held.get(slot, b"")) < size:
            held[slot] = bytearray(max(size, PIECE * dtype.itemsize))
        bytes_ = held[slot]
        return memoryview(bytes_)[:size], torch.frombuffer(bytes_, dtype=dtype, count=count)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For work on one whole matrix: a second one waits, and torch has its own threads until the end."""
        with self._whole:
            torch.set_num_threads(self._before)
            try:
                yield
            finally:
                torch.set_num_threads(1)

    def __enter__(self) -> Workers:
        # a piece is small and every core has one: torch's own threads would only be in the way
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)


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
        return torch.Size(self.shape).numel()

    @property
    def row(self) -> int:
        """Elements of a row; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    def spans(self) -> list[tuple[int, int]]:
        """(first element, number of elements) of every piece, in order."""
        length = max(PIECE // self.row, 1) * self.row if self.by_rows and self.row else PIECE
        return [(start, min(length, self.count - start)) for start in range(0, self.count, length)]

    def map(self, function: Callable[[Piece], R]) -> list[R]:
        """What `function` gives for every piece, in order; pieces are read and worked on in parallel."""
        return self.workers.map(lambda span: function(self.read(*span)), self.spans())

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
        if change is not None and not finite(change):
            raise self._not_finite(source)
        return change

    def _on_base(self, slot: object, base: Tensor | None, change: Tensor) -> Tensor:
        assert base is not None
        _, values = self.workers.buffer((slot, "float32"), torch.float32, len(base))
        return torch.add(base, change, out=values)

    def _read(self, source: Source, slot: object, start: int, count: int) -> Tensor:
        stored = source.reader.headers[source.name].dtype
        dtype = getattr(torch, TORCH_NAMES[stored])
        into, raw = self.workers.buffer((slot, "stored"), dtype, count)
        source.reader.read_into(source.name, start * WIDTH[stored], into)
        values = raw
        if dtype != torch.float32:
            _, values = self.workers.buffer((slot, "float32"), torch.float32, count)
            values.copy_(raw)
        if not finite(values):
            raise self._not_finite(source)
        return values

    def _not_finite(self, source: Source) -> CheckpointError:
        return CheckpointError(
            f"{source.model}: NaN or Inf in {source.name} ({source.reader.headers[source.name].file}): "
            "train or download it anew; a merge would carry it on"
        )

    def write(self, combine: Combine, writer: TensorWriter) -> None:
        """Make every piece and put it into its place, cast once. Raises CheckpointError where NaN or Inf come out."""
        stored = writer.headers[self.name].dtype
        dtype = getattr(torch, TORCH_NAMES[stored])

        def make(span: tuple[int, int]) -> None:
            made = combine(self.read(*span))
            bytes_, cast = self.workers.buffer("out", dtype, span[1])
            if not finite(cast.copy_(made)):
                raise CheckpointError(f"{self.name}: the merge gives values that {stored} cannot hold")
            writer.write(self.name, span[0] * WIDTH[stored], bytes_)

        self.workers.map(make, self.spans())


def finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf. A sum finds them; only where it is not finite itself is each looked at."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def same_bytes(sources: Sequence[Source]) -> bool:
    """Whether all parents store the same bytes: for tensors of whole numbers, which have no mean."""
    first, *others = (source.reader.read(source.name) for source in sources)
    return all(torch.equal(first, other) for other in others)
