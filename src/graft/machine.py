"""What of this machine a process may use, and how its bytes are told."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

BOOT, PROCESSORS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/cpuinfo")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def maker() -> str:
    """Who made the processor, in its own words (`GenuineIntel`, `AuthenticAMD`); empty where nothing tells."""
    if not PROCESSORS.exists():  # Windows ends its description with it
        return platform.processor().rpartition(", ")[2]
    lines = [line.partition(":") for line in PROCESSORS.read_text().splitlines()]
    return next((said.strip() for name, _, said in lines if name.strip() == "vendor_id"), "")


def boot() -> str | None:
    """Another one whenever the machine has started anew; None where the system does not tell."""
    return BOOT.read_text().strip() if BOOT.exists() else None


def share_of_cores(processes: int) -> dict[str, str]:
    """Environment in which each of `processes` computes with its share of the cores, unless the user has set it."""
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // processes))}


LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container says how much memory it may use."""


def memory(device: str | None = None) -> int:
    """Bytes of memory of a device; None: the accelerator, or the computer where there is none."""
    if device != "cpu" and (device is not None or _may_have_accelerator()):
        import torch

        if torch.cuda.is_available() and (device is None or device.startswith("cuda")):
            return int(torch.cuda.get_device_properties(device or "cuda").total_memory)
    import psutil

    said = [Path(place).read_text().strip() for place in LIMITS if Path(place).is_file()]
    return min([psutil.virtual_memory().total, *(int(words) for words in said if words.isdecimal())])


def _may_have_accelerator() -> bool:
    """Whether it is worth a second to ask torch: on Linux no GPU is seen that has no file under /dev."""
    return sys.platform != "linux" or any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def size(number: float) -> str:
    """Bytes in words: `12.4 MB`."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
