"""Which tensors are finished, so that a merge that was killed goes on where it stood.

A tensor is noted as soon as it is written. What is written is there for as long as the machine runs, whatever becomes
of the process; a machine that goes down keeps what was brought to the disk before, which is noted too.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.disk import atomic_write, sync
from graft.machine import boot

SYNC_BYTES = 1 << 34
"""After so many bytes a merge waits until the disk has the weights: not all is lost where the machine goes down."""
UNSURE_BYTES = 1 << 30
"""The same where the system does not tell whether the machine has started anew: nothing else then outlives a kill."""
ON_DISK = json.dumps(None)
"""The line that says so of all names above it."""


class Journal:
    """`.finished` names, `.note(name, size)` from any thread.

    The file: what is done (JSON-ready; notes of any other work are thrown away), on which run of the machine, names. It
    is there as soon as there is something to go on from.
    """

    def __init__(self, path: Path, what: Any, folder: Path):
        self.path, self.folder = path, folder
        self._lock = threading.Lock()
        self._bytes = 0
        self._every = SYNC_BYTES if boot() is not None else UNSURE_BYTES
        head = [json.dumps(what, sort_keys=True), json.dumps(boot() or str(uuid.uuid4()))]
        durable, there = self._read(head)
        self.finished = {*durable, *there}
        self._first = [] if self.finished else [*head, ON_DISK]
        if self.finished:
            noted = [*map(json.dumps, durable), ON_DISK, *map(json.dumps, there)]
            atomic_write(path, "".join(f"{line}\n" for line in (*head, *noted)))
        else:
            path.unlink(missing_ok=True)

    def _read(self, head: Sequence[str]) -> tuple[list[str], list[str]]:
        """Names that were brought to the disk, and those behind them that are there as the machine still runs."""
        text = self.path.read_text() if self.path.exists() else ""
        # a kill may have torn the last line
        lines = text.split("\n")[:-1]
        if lines[:1] != head[:1]:
            return [], []
        names = [json.loads(line) for line in lines[2:]]
        last = max((place for place, name in enumerate(names) if name is None), default=-1)
        durable = [name for name in names[: last + 1] if name is not None]
        return durable, names[last + 1 :] if lines[1:2] == head[1:] else []

    def note(self, name: str, size: int) -> None:
        """A tensor of `size` bytes has been written whole."""
        with self._lock:
            self._append(*self._first, json.dumps(name))
            self._first = []
            self.finished.add(name)
            self._bytes += size
            if self._bytes >= self._every:
                for path in self.folder.glob("*.safetensors"):
                    sync(path)
                self._append(ON_DISK)
                self._bytes = 0

    def _append(self, *lines: str) -> None:
        with open(self.path, "a") as file:
            file.write("".join(f"{line}\n" for line in lines))
