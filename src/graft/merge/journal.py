"""Which tensors are finished, so that a merge that was killed goes on where it stood."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

SYNC_BYTES = 1 << 30
"""After so many bytes the weights are brought to the disk; only then are their names noted."""


class Journal:
    """`with Journal(file, what) as journal`: `.finished` names, `.note(name, size)` from any thread.

    `what` describes the work (JSON-ready); notes of any other work are thrown away.
    """

    def __init__(self, path: Path, what: Any, folder: Path):
        self.path, self.folder = path, folder
        self.what = json.dumps(what, sort_keys=True)
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._bytes = 0
        self.finished = self._read()

    def _read(self) -> set[str]:
        text = self.path.read_text() if self.path.exists() else ""
        lines = text.split("\n")[:-1]
        if not lines or lines[0] != self.what:
            self.path.write_text(self.what + "\n")
            return set()
        # a kill may have torn the last line: the next is not to begin behind it
        os.truncate(self.path, text.rfind("\n") + 1)
        return {json.loads(line) for line in lines[1:]}

    def note(self, name: str, size: int) -> None:
        """A tensor of `size` bytes has been written whole."""
        with self._lock:
            self._waiting.append(name)
            self._bytes += size
            if self._bytes >= SYNC_BYTES:
                self._flush()

    def _flush(self) -> None:
        for path in self.folder.glob("*.safetensors"):
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        with open(self.path, "a") as file_:
            file_.writelines(json.dumps(name) + "\n" for name in self._waiting)
        self.finished.update(self._waiting)
        self._waiting, self._bytes = [], 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._waiting:
            with self._lock:
                self._flush()
