"""What took long to find out and stays true, kept for all runs of a user: a file each, any of which may be removed.

`$GRAFT_CACHE` names the folder (empty: nothing is kept), else it is `graft` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from graft.disk import atomic_write
from graft.errors import DiskError


def home() -> Path | None:
    """The folder; None where nothing is to be kept."""
    if "GRAFT_CACHE" in os.environ:
        named = os.environ["GRAFT_CACHE"]
        return Path(named).expanduser() if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "graft"


def recall(kind: str, about: str, instead: Path | None = None) -> str | None:
    """What was kept about something; None where nothing was, or it cannot be read.

    `instead`: the folder where it stands where nothing is kept for all runs.
    """
    place = _place(kind, about, instead)
    try:
        return place.read_text(encoding="utf-8") if place is not None else None
    except (OSError, UnicodeDecodeError):
        return None


def keep(kind: str, about: str, found: str, instead: Path | None = None) -> None:
    """Keep what was found about something, where that may be written; what was kept about it before is replaced."""
    place = _place(kind, about, instead)
    if place is not None:
        with suppress(DiskError, OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(place, found)


def _place(kind: str, about: str, instead: Path | None) -> Path | None:
    folder = home() or instead
    return folder / kind / hashlib.sha256(about.encode()).hexdigest()[:32] if folder is not None else None
