"""Where nodes are made: in this process, or in several beside each other. Another executor need only have `submit`."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from graft.errors import GraftError, RunError
from graft.lineage import Manifest
from graft.making import Work, make


@dataclass(frozen=True)
class Failure:
    """Why a node was not made: the message, the exit code of its error, and the trace for those who debug."""

    message: str
    exit_code: int
    trace: str


Outcome = Manifest | Failure


class Executor(Protocol):
    """Makes nodes. `slots` is how many may be under way at a time."""

    slots: int

    def submit(self, work: Work) -> Future[Outcome]:
        """Begin to make a node; the future gives its manifest or its failure."""

    def close(self) -> None:
        """Stop what is under way. Everything can be gone on from later."""


class Here:
    """Makes one node at a time in this process."""

    slots = 1

    def submit(self, work: Work) -> Future[Outcome]:
        """Make the node now."""
        done: Future[Outcome] = Future()
        done.set_result(attempt(work))
        return done

    def close(self) -> None:
        """Nothing is under way between nodes."""


class Processes:
    """Makes up to `slots` nodes side by side, each in a process of its own with its share of the cores."""

    def __init__(self, slots: int):
        self.slots = slots
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="graft")
        self._running: set[subprocess.Popen[bytes]] = set()

    def submit(self, work: Work) -> Future[Outcome]:
        """Begin to make the node in a new process."""
        return self._pool.submit(self._make, work)

    def _make(self, work: Work) -> Outcome:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "graft._worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | _threads(self.slots),
        )
        self._running.add(process)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                pickle.dump(work, process.stdin)
                process.stdin.flush()
            # stdin stays open as long as this process lives: its end tells the other to stop
            answer = process.stdout.read()
            code = process.wait()
        finally:
            self._running.discard(process)
            process.kill()
        if not answer:
            return Failure(f"its process ended early (exit status {code}); run again to go on", 1, "")
        return pickle.loads(answer)

    def close(self) -> None:
        """Stop the processes and wait for their end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.terminate()
        self._pool.shutdown(wait=True)


def _threads(slots: int) -> dict[str, str]:
    """Each process's share of the cores, unless the user has set it."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // slots))}


def attempt(work: Work) -> Outcome:
    """The manifest of the node, or why there is none."""
    try:
        return make(work)
    except GraftError as error:
        return Failure(str(error), error.exit_code, traceback.format_exc())
    except Exception as error:  # noqa: BLE001  (whatever goes wrong in one node, the others go on and all is reported)
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Failure(words, RunError.exit_code, traceback.format_exc())
