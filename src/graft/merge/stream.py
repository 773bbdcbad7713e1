"""One tensor of all parents, in float32, a cache-sized piece at a time, on all cores.

A method sees a `Tensors`: the tensor of one name in every parent. It may stream over the pieces as often as it needs to
(`map`) before it gives a `Combine`, which makes each piece of the output from the same piece of the inputs. Neither the
size of the model nor that of the tensor decides what is held in memory.

On an accelerator the same functions run on larger pieces: each thread reads one into pinned memory, works on it in a
stream of its own, and writes what comes back, so that reading and writing overlap with the others' arithmetic.
"""

from __future__ import annotations

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
from graft.errors import CannotCombine, CheckpointError
from graft.finite import finite
from graft.machine import cores

PIECE = 1 << 19
"""Elements of a piece: those of a few models, in float32, lie in the cores' caches, and the work on them takes longer
than the threads' waiting for each other between its steps."""
FAR_PIECE = 1 << 21
"""Elements of a piece on an accelerator: enough work to be worth a start of its kernels."""
COPIED = 1 << 22
"""Bytes of a piece of what is taken over as it is."""
FAR_THREADS = 6
"""Pieces on an accelerator at the same time, at most; with their number and size its memory is bounded."""

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


class Workers:
    """A thread a core, each with its own buffers, which are used again for every piece; pieces lie on `device`."""

    def __init__(self, threads: int | None = None, device: str = "cpu"):
        self.device = torch.device(device)
        self.threads = threads or (cores() if self.near else min(cores(), FAR_THREADS))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        self._own = threading.local()
        self._whole = threading.Lock()
        self._before = torch.get_num_threads()

    @property
    def near(self) -> bool:
        """Whether pieces stay in the processor's own memory."""
        return self.device.type == "cpu"

    @property
    def _streams(self) -> bool:
        return self.device.type == "cuda"

    def map(self, function: Callable[[R], object], items: Sequence[R]) -> list:
        """The results in the order of the items; the first exception is raised after the others have stopped."""
        if self._streams:
            # what this thread has begun on the device is there before another stream reads it
            torch.cuda.current_stream(self.device).synchronize()
        futures = [self._pool.submit(self._in_stream, function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _in_stream(self, function: Callable[[R], object], item: R) -> object:
        if not self._streams:
            return function(item)
        own = self._own.__dict__
        if "stream" not in own:
            own["stream"] = torch.cuda.Stream(self.device)
        with torch.cuda.stream(own["stream"]):
            found = function(item)
            # buffers are filled anew, and others read what was made, only when the device is done with them
            own["stream"].synchronize()
            return found

    def buffer(self, slot: object, dtype: torch.dtype, count: int) -> tuple[memoryview, Tensor]:
        """`count` elements of this thread's buffer for `slot`, as bytes and as a tensor over the same memory."""
        # every call into torch lets go of the interpreter and has to wait for it again: views are kept
        views: dict[object, tuple[int, memoryview, Tensor]] = self._own.__dict__.setdefault("views", {})
        if (slot, dtype) not in views or views[slot, dtype][0] != count:
            found = self._room(slot, count * dtype.itemsize)
            views[slot, dtype] = count, memoryview(found.numpy()), found.view(dtype)  # type: ignore[arg-type]
        _, bytes_, values = views[slot, dtype]
        return bytes_, values

    def _room(self, slot: object, size: int) -> Tensor:
        held: dict[object, Tensor] = self._own.__dict__.setdefault("held", {})
        if slot not in held or len(held[slot]) < size:
            held[slot] = torch.empty(max(size, 2 * PIECE), dtype=torch.uint8, pin_memory=self._streams)
        return held[slot][:size]

    def floats(self, raw: Tensor, slot: object) -> Tensor:
        """What was read, as float32 on the device; the memory is that of a buffer of this thread where that will do."""
        if not self.near:
            narrow = raw.float() if raw.dtype == torch.float64 else raw
            return narrow.to(self.device, non_blocking=self._streams).float()
        if raw.dtype == torch.float32:
            return raw
        _, values = self.buffer((slot, "float32"), torch.float32, len(raw))
        return values.copy_(raw)

    def store(self, made: Tensor, into: Tensor) -> bool:
        """Cast what was made and bring it into a buffer; whether it is finite in that type."""
        # on an accelerator it is cast before it comes back, and looked at there
        there = made if self.near else made.to(into.dtype)
        into.copy_(there)
        return finite(into if self.near else there)

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
        return change if change is None else source.checked(change).to(self.workers.device)

    def _on_base(self, slot: object, base: Tensor | None, change: Tensor) -> Tensor:
        assert base is not None
        if not self.workers.near:
            return base + change
        _, values = self.workers.buffer((slot, "float32"), torch.float32, len(base))
        return torch.add(base, change, out=values)

    def _read(self, source: Source, slot: object, start: int, count: int) -> Tensor:
        stored = source.reader.headers[source.name].dtype
        dtype = getattr(torch, TORCH_NAMES[stored])
        into, raw = self.workers.buffer((slot, "stored"), dtype, count)
        source.reader.read_into(source.name, start * WIDTH[stored], into)
        return source.checked(self.workers.floats(raw, slot))

    def write(self, combine: Combine, writer: TensorWriter) -> None:
        """Make every piece and put it into its place, cast once. Raises CheckpointError where NaN or Inf come out."""
        stored = writer.headers[self.name].dtype
        dtype = getattr(torch, TORCH_NAMES[stored])

        def make(span: tuple[int, int]) -> None:
            made = combine(self.read(*span))
            bytes_, cast = self.workers.buffer("out", dtype, span[1])
            if not self.workers.store(made, cast):
                raise CheckpointError(f"{self.name}: the merge gives values that {stored} cannot hold")
            writer.write(self.name, span[0] * WIDTH[stored], bytes_)

        self.workers.map(make, self.spans())


def copy_whole_numbers(tensors: Tensors, writer: TensorWriter) -> None:
    """Buffers, which have no mean, are taken over as they are stored.

    Raises CannotCombine where they are not the same in all parents.
    """
    sources = [*([tensors.base] if tensors.base else []), *tensors.models]
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
