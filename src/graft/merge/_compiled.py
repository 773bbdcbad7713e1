"""The kernels of merges as machine code. Where there is none, merges go the plain way to the same bytes."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

from graft import machine_code
from graft.machine_code import Compiled

_LOADING = threading.Lock()
SOURCES = ("_kernels.py", "_stored.py", "_drawing.py", "_ranking.py", "_instructions.py", "_blocks.py")
"""What the kernels are written in."""


def kernel(name: str, stored: str, made: str) -> Compiled | None:
    """A kernel of `_kernels` for stored and made types; None where there is no compiler for it. From any thread."""
    with _LOADING:
        return _kernel(name, stored, made)


@cache
def _kernel(name: str, stored: str, made: str) -> Compiled | None:
    sources = [Path(__file__).with_name(source) for source in SOURCES]
    return machine_code.function(f"{name} {stored} {made}", sources, lambda: _compile(name, stored, made))


def _compile(name: str, stored: str, made: str) -> str:
    from graft.merge._kernels import KERNELS

    return machine_code.compiled(name, *KERNELS[name](stored, made))
