"""Memory on the CPU that is freed and taken again, in every step of a training or a scorer, stays with its process, and
is not searched for what only refers to itself where much is made that does not."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of mallopt's parameters (malloc.h)."""
LARGEST = 2**31 - 1
USUAL = 32 << 20
"""What glibc's own thresholds come to in a process that frees large blocks (mallopt(3), M_MMAP_THRESHOLD)."""


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, what is freed waits for its next use; behind it, it is given back to the system.

    glibc gives large blocks back at once, and what lies free at the end of its heap soon. Each step would then take the
    same memory anew, which the system clears page by page: up to a tenth of the time on a few cores. The most that is
    held is as before. Does nothing where the C library is not glibc. Entered inside
    itself, it ends with the inner one.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_THRESHOLD, LARGEST)
    library.mallopt(TRIM_THRESHOLD, LARGEST)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, USUAL)
        library.mallopt(TRIM_THRESHOLD, 2 * USUAL)
        library.malloc_trim(0)


@contextmanager
def unsearched() -> Iterator[None]:
    """Inside, nothing is searched for objects that only refer to each other: what has many small ones that do not would
    have all of a process's objects looked through again and again."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()
