"""Progress for anything that takes over two seconds: what, how far, rate, time left. Written to stderr.

On a terminal one line is rewritten in place; elsewhere a plain line appears every `every_s` seconds. `quiet` (which
`--json` sets) prints nothing.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType


def say(sentence: str) -> None:
    """A line on stderr that people should read while work goes on; nothing with `--json`."""
    if os.environ.get("GRAFT_QUIET") != "1":
        sys.stderr.write(sentence + "\n")
        sys.stderr.flush()


class Progress:
    """`with Progress("tokenising", total, "bytes") as p: p.advance(n)`. `total` may be None when it is not known."""

    def __init__(self, label: str, total: float | None, unit: str, *, quiet: bool | None = None, every_s: float = 10.0):
        self.label, self.total, self.unit, self.done = label, total, unit, 0.0
        self.quiet = os.environ.get("GRAFT_QUIET") == "1" if quiet is None else quiet
        self.live = sys.stderr.isatty()
        self.every_s = 0.2 if self.live else every_s
        self.started = self.shown = time.monotonic()
        self.start = 0.0
        self.note = ""
        self._written = False

    def begin_at(self, done: float) -> None:
        """Go on from `done` units that an earlier run did; the rate counts only what is done from here."""
        self.done = self.start = done

    def advance(self, units: float, note: str = "") -> None:
        """`units` more are done; `note` (for example the loss) is shown behind the rate."""
        self.done += units
        self.note = note or self.note
        now = time.monotonic()
        if not self.quiet and now - self.shown >= self.every_s and now - self.started >= min(2.0, self.every_s * 10):
            self.shown = now
            self._write(self.line())

    def line(self) -> str:
        """The line shown: label, share done, rate, time left, note."""
        spent = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.start) / spent
        parts = [self.label]
        total = self.total if self.total and self.done <= self.total else None  # what was guessed too low tells nothing
        if total:
            parts.append(f"{100 * self.done / total:.0f} %")
        parts.append(f"{_si(rate)} {self.unit}/s")
        if total and rate > 0:
            parts.append(f"{_clock((total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return " · ".join(parts)

    def _write(self, line: str) -> None:
        self._written = True
        sys.stderr.write(f"\r\033[K{line}" if self.live else line + "\n")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live and self._written:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def _si(number: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
