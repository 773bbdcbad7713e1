"""What of this machine a process may use, and how its bytes are told."""

from __future__ import annotations

import os
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def boot() -> str | None:
    """Another one whenever the machine has started anew; None where the system does not tell."""
    return BOOT.read_text().strip() if BOOT.exists() else None


def share_of_cores(processes: int) -> dict[str, str]:
    """Environment in which each of `processes` computes with its share of the cores, unless the user has set it."""
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // processes))}


def size(number: float) -> str:
    """Bytes in words: `12.4 MB`."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
