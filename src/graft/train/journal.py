"""What a training tells: `log.jsonl`, the trackers that were asked for, and the line of progress."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

from graft.disk import disk_errors
from graft.progress import Progress
from graft.train.place import Place
from graft.train.trackers import Title, Trackers

Entry = Mapping[str, float | None]


class Journal:
    """Entries go into `out/log.jsonl`, one JSON object a line, and to the trackers; the main process only.

    Opening it after a resume at step n cuts the lines of later steps, and a line a kill has torn.
    """

    def __init__(
        self,
        place: Place,
        out: Path,
        step: int,
        steps: int,
        settings: Mapping[str, Any],
        title: Title,
        quiet: bool | None = None,
    ):
        self.place, self.file = place, out / "log.jsonl"
        self.progress = Progress("training", steps, "steps", quiet=True if not place.main else quiet)
        self.progress.begin_at(step)
        self.step = step
        self._handle: BufferedWriter | None = None
        if place.main:
            with disk_errors(self.file):
                out.mkdir(parents=True, exist_ok=True)
                keep_until(self.file, step)
                self._handle = self.file.open("ab")
        self.trackers = Trackers(place, title, settings, step)

    def write(self, entry: Entry) -> None:
        """One line. Trackers get the numbers under the same names."""
        if self._handle is not None:
            with disk_errors(self.file):
                self._handle.write(json.dumps(entry).encode() + b"\n")
        self.trackers.tell(entry)

    def show(self, step: int, note: str) -> None:
        """Move the progress to `step`."""
        self.progress.advance(step - self.step, note)
        self.step = step

    def sync(self) -> None:
        """Bring what was written to the disk: a state may only be newer than its log."""
        if self._handle is not None:
            with disk_errors(self.file):
                self._handle.flush()
                os.fsync(self._handle.fileno())

    def __enter__(self) -> Journal:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        if self._handle is not None:
            self._handle.close()
        self.trackers.close()


def keep_until(file: Path, step: int) -> None:
    """Cut `file` behind the last whole line of the steps up to `step`."""
    if not file.exists():
        return
    size = 0
    with file.open("rb+") as lines:
        for line in lines:
            if _step_of(line) > step:
                break
            size += len(line)
        lines.truncate(size)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
