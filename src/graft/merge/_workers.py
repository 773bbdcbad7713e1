"""The threads that work on pieces, each with its own memory, on the processor or beside an accelerator. Light."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from graft.finite import finite
from graft.machine import cores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAR_THREADS = 6
"""Pieces on an accelerator at the same time, at most; with their number and size its memory is bounded."""
TOGETHER = 4
"""Pieces that a thread takes at a time: to hand each out by itself costs a part of the work on it."""
LEAST = 1 << 20
"""Bytes of a buffer, at least."""

R = TypeVar("R")


class Workers:
    """A thread a core, each with its own buffers, which are used again for every piece; pieces lie on `device`."""

    def __init__(self, threads: int | None = None, device: str = "cpu"):
        self.device = device
        self.threads = threads or (cores() if self.near else min(cores(), FAR_THREADS))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        self._own = threading.local()
        self._whole = threading.Lock()
        self._few = threading.Lock()
        self._before: int | None = None

    @property
    def near(self) -> bool:
        """Whether pieces stay in the processor's own memory."""
        return self.device.startswith("cpu")

    @property
    def _streams(self) -> bool:
        return self.device.startswith("cuda")

    def map(self, function: Callable[[R], object], items: Sequence[R], together: int = 1) -> list:
        """The results in the order of the items; the first exception is raised after the others have stopped.

        `together`: a thread of the processor takes so many small items at a time, but leaves some to the others.
        """
        if self._streams:
            import torch

            # what this thread has begun on the device is there before another stream reads it
            torch.cuda.current_stream(self.device).synchronize()
        size = max(min(together, len(items) // self.threads), 1) if self.near else 1
        runs = [items[at : at + size] for at in range(0, len(items), size)]
        futures = [self._pool.submit(lambda run: [self._in_stream(function, one) for one in run], run) for run in runs]
        try:
            return [found for future in futures for found in future.result()]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _in_stream(self, function: Callable[[R], object], item: R) -> object:
        if not self._streams:
            return function(item)
        import torch

        own = self._own.__dict__
        if "stream" not in own:
            own["stream"] = torch.cuda.Stream(self.device)
        with torch.cuda.stream(own["stream"]):
            found = function(item)
            # buffers are filled anew, and others read what was made, only when the device is done with them
            own["stream"].synchronize()
            return found

    def array(self, slot: object, dtype: Any, count: int) -> np.ndarray:
        """`count` elements of this thread's memory for `slot`; what lies there is what was left by the last use."""
        arrays: dict[object, np.ndarray] = self._own.__dict__.setdefault("arrays", {})
        size = count * np.dtype(dtype).itemsize
        if slot not in arrays or arrays[slot].nbytes < size:
            arrays[slot] = np.empty(max(size, LEAST), np.uint8)
        return arrays[slot][:size].view(dtype)

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
        import torch

        self._one_thread_each()
        held: dict[object, Tensor] = self._own.__dict__.setdefault("held", {})
        if slot not in held or len(held[slot]) < size:
            held[slot] = torch.empty(max(size, LEAST), dtype=torch.uint8, pin_memory=self._streams)
        return held[slot][:size]

    def floats(self, raw: Tensor, slot: object) -> Tensor:
        """What was read, as float32 on the device; the memory is that of a buffer of this thread where that will do."""
        import torch

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

    def _one_thread_each(self) -> None:
        # a piece is small and every core has one: torch's own threads would only be in the way
        import torch

        with self._few:
            if self._before is None:
                self._before = torch.get_num_threads()
                torch.set_num_threads(1)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For work on one whole matrix: a second one waits, and torch has its own threads until the end."""
        import torch

        self._one_thread_each()
        assert self._before is not None
        with self._whole:
            torch.set_num_threads(self._before)
            try:
                yield
            finally:
                torch.set_num_threads(1)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._before is not None:
            import torch

            torch.set_num_threads(self._before)
