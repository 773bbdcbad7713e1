"""A launcher such as torchrun that imports for all, then forks: `--nproc-per-node N -m MODULE …`.

The process whose rank is in `SLOW_RANK` writes models late.
"""

import importlib
import os
import runpy
import signal
import sys
import time

from processes import ALL, meeting


def main():
    count, module = int(sys.argv[2]), sys.argv[4]
    for name in ALL:
        importlib.import_module(name)
    with meeting() as place:
        together(count, module, place)


def late(module, name):
    """The function of a module does its work a second later."""
    function = getattr(module, name)

    def later(*args, **options):
        time.sleep(1)
        return function(*args, **options)

    setattr(module, name, later)


def together(count, module, place):
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    group = []
    for rank in range(count):
        if (pid := os.fork()) == 0:
            os.environ.update({**place, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            sys.argv = sys.argv[4:]
            if os.environ.get("SLOW_RANK") == str(rank):
                late(importlib.import_module("graft.models"), "save")
            runpy.run_module(module, run_name="__main__")
            os._exit(0)
        group.append(pid)
    while group:
        pid, status = os.wait()
        group.remove(pid)
        if status:
            for other in group:
                os.kill(other, signal.SIGTERM)
            sys.exit(1)


main()
