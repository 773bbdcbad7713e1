"""The arrays of a known text, which the compiled functions work on, and these functions."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from graft import machine_code
from graft.ensemble.byte_level import _layout as at
from graft.errors import RunError
from graft.machine_code import Compiled

SOURCES = ("_walk.py", "_step.py", "_rows.py", "_fields.py", "_shares.py", "_layout.py")
"""What the compiled functions are written in."""
NAMES = ("ranges", "begin", "reduced", "walk", "listed", "seen", "needed", "moved_rows", "linked")


@cache
def kernels() -> dict[str, Compiled] | None:
    """The compiled functions; None where there is no compiler for them."""
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    found: dict[str, Compiled] = {}
    for name in NAMES:
        one = machine_code.function(f"bytes {name}", sources, partial(_compiled, name))
        if one is None:
            return None
        found[name] = one
    return found


def _compiled(name: str) -> str:
    from graft.ensemble.byte_level._walk import KERNELS

    made: Any = KERNELS[name]
    return machine_code.compiled(name, *made)


def address(array: np.ndarray) -> int:
    """Where an array lies in memory."""
    return int(array.__array_interface__["data"][0])


class Arrays:
    """What a text's functions work on: `frame` and the arrays that it names, which grow where there is no room."""

    def __init__(self) -> None:
        made = kernels()
        assert made is not None
        self.kernels = made
        self.frame = np.zeros(at.FIELDS, np.int64)
        self.pointer = address(self.frame)
        self.arrays: dict[int, np.ndarray] = {}

    def _hold(self, place: int, array: np.ndarray) -> np.ndarray:
        self.arrays[place] = array
        self.frame[place] = address(array)
        return array

    def _nodes(self, room: int) -> None:
        count, before = int(self.frame[at.NODE_COUNT]), self.arrays.get(at.NODES)
        nodes, trues, shares = np.full((at.NODE, room), -1, np.int64), np.full(room, -np.inf), np.ones(room)
        lists = {place: np.zeros(room, np.int64) for place in (at.LIST, at.CHAIN)}
        if before is not None:
            nodes[:, :count], trues[:count] = before[:, :count], self.arrays[at.TRUES][:count]
            shares[:count] = self.arrays[at.SHARES][:count]
            for place, made in lists.items():
                made[:count] = self.arrays[place][:count]
        for place, made in lists.items():
            self._hold(place, made)
        self.nodes, self.trues = self._hold(at.NODES, nodes), self._hold(at.TRUES, trues)
        self._hold(at.SHARES, shares)
        self.frame[at.NODE_ROOM] = room

    def _pool(self, room: int) -> None:
        used, before = int(self.frame[at.POOL_USED]), self.arrays.get(at.POOL)
        pool = np.zeros(room)
        if before is not None:
            pool[:used] = before[:used]
        self._hold(at.POOL, pool)
        self.frame[at.POOL_ROOM] = room

    def _open(self, room: int) -> None:
        whole = np.zeros((at.BUFFERS, at.HYPOTHESIS, room), np.int64)
        reals = np.zeros((at.BUFFERS, 3, room))
        if at.OPEN in self.arrays:
            before = int(self.frame[at.OPEN_ROOM])
            whole[..., :before], reals[..., :before] = self.arrays[at.OPEN], self.arrays[at.WEIGHTS]
        self.open, self.weights = self._hold(at.OPEN, whole), self._hold(at.WEIGHTS, reals)
        self.frame[at.OPEN_ROOM] = room

    def _born(self, room: int) -> None:
        self._hold(at.BORN, np.zeros((2, room), np.int64))
        self._hold(at.BORN_WEIGHTS, np.zeros((3, room)))
        self.frame[at.BORN_ROOM] = room

    def _asks(self, room: int) -> None:
        self.asks = self._hold(at.ASKS, np.zeros(room, np.int64))
        self.frame[at.ASK_ROOM] = room

    def _entries(self, room: int) -> None:
        self._hold(at.ENTRIES, np.zeros(int(self.frame[at.SPAN]) + 2, np.int64))
        while True:
            self._hold(at.RANGES, np.zeros((4, room), np.int64))
            self._hold(at.SPELT, np.zeros(room, np.int64))
            self.frame[[at.RANGE_ROOM, at.SPELT_ROOM]] = room
            if self.kernels["ranges"](self.pointer) == at.DONE_ALL:
                return
            room *= 2

    def _more(self, status: int) -> None:
        """Room for what there was none for."""
        grow = {
            at.ROOM_NODES: (self._nodes, at.NODE_ROOM),
            at.ROOM_POOL: (self._pool, at.POOL_ROOM),
            at.ROOM_OPEN: (self._open, at.OPEN_ROOM),
            at.ROOM_BORN: (self._born, at.BORN_ROOM),
            at.ROOM_ASKS: (self._asks, at.ASK_ROOM),
        }
        if status not in grow:
            raise RunError(f"expected room for a text's arrays or a way to get it, found status {status}")
        make, place = grow[status]
        make(2 * int(self.frame[place]))

    def _call(self, name: str, *arguments: int) -> None:
        while (status := self.kernels[name](self.pointer, *arguments)) != at.DONE_ALL:
            self._more(status)
