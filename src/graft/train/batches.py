"""Batches of a step, made ahead of the loop by a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch

from graft.data.rows import Rows
from graft.data.turns import by_task

Batch = dict[str, torch.Tensor]


class Weighs(Protocol):
    """The part of an objective that batches need."""

    def weight(self, batch: Batch) -> float:
        """Units the loss sums over in this batch."""


@dataclass(frozen=True)
class Step:
    """What one process reads in one step: its pieces, the weight of its loss and the tokens in them."""

    pieces: list[Batch]
    weight: float
    tokens: int


def tokens_in(batch: Batch) -> int:
    """Tokens the model reads in this batch, padding left out where segments or a two-dimensional mask tell.

    In a batch of several tasks (`TASK/input_ids`) those of all of them.
    """
    if any("/" in name for name in batch):
        return sum(map(tokens_in, by_task(batch).values()))
    if "segments" in batch:
        return int((batch["segments"] >= 0).sum())
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return int(mask.sum())
    ids = batch.get("input_ids")
    return (next(iter(batch.values())) if ids is None else ids).numel()


def spans(step: int, batch_size: int, accumulate: int, rank: int = 0, world: int = 1) -> list[range]:
    """The rows of `step` that process `rank` of `world` reads, one range a piece; all processes' make up the step."""
    size = batch_size // (accumulate * world)
    first = step * batch_size + rank * size
    return [range(start, start + size) for start in range(first, first + accumulate * world * size, world * size)]


def make_step(rows: Rows, pieces: Sequence[range], objective: Weighs, pin: bool = False) -> Step:
    """Read, collate and weigh `pieces`; in pinned memory where the device can copy from it on the side."""
    batches = [rows.collate([rows[index] for index in piece]) for piece in pieces]
    weight = sum(float(objective.weight(batch)) for batch in batches)
    tokens = sum(tokens_in(batch) for batch in batches)
    pinned: list[Batch] = [{name: t.pin_memory() for name, t in b.items()} if pin else b for b in batches]
    return Step(pinned, weight, tokens)


class Ahead:
    """`with Ahead(rows, plans, objective) as steps: for step in steps`: each plan (ranges of rows) read ahead of time.

    At most `depth` steps wait. What goes wrong in the thread is raised in the loop.
    """

    def __init__(self, rows: Rows, plans: Iterator[list[range]], objective: Weighs, pin: bool = False, depth: int = 2):
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(rows, plans, objective, pin), daemon=True)

    def _fill(self, rows: Rows, plans: Iterator[list[range]], objective: Weighs, pin: bool) -> None:
        torch.set_num_threads(1)  # for this thread: a second pool of threads would fight with the loop's for the cores
        try:
            for pieces in plans:
                self._put(make_step(rows, pieces, objective, pin))
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the loop, which raises it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Step]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
