"""Where nodes are made: in this process, in several beside each other, or each by several processes together.

Another executor need only have what `Executor` has.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from graft import verbs
from graft.errors import Failure, RequestError, attempt
from graft.lineage import Manifest
from graft.machine import share_of_cores
from graft.making import Work, make
from graft.settings import Settings
from graft.train.parallel import Parallel
from graft.train.settings import TrainSettings

Outcome = Manifest | Failure


class Executor(Protocol):
    """Makes nodes. `slots` is how many may be under way at a time."""

    slots: int

    def submit(self, work: Work) -> Future[Outcome]:
        """Begin to make a node; the future gives its manifest or its failure."""

    def close(self) -> None:
        """Stop what is under way. Everything can be gone on from later."""


class Here:
    """Makes one node at a time in this process, or in as many as its settings name (`parallel.devices`)."""

    slots = 1

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def submit(self, work: Work) -> Future[Outcome]:
        """Make the node now."""
        done: Future[Outcome] = Future()
        launcher = self._launcher(work) if verbs.verb(work.verb).together else None
        done.set_result(attempt(lambda: make(work)) if launcher is None else self._launch(launcher, work))
        return done

    def _launcher(self, work: Work) -> list[str] | None:
        """The command that starts the processes which make this node together; None where it is made in this one."""
        parallel = parallel_of(work.settings)
        if parallel is None or parallel.devices is None:
            return None
        several = ["--standalone", "--nproc-per-node", str(parallel.devices)]
        return [sys.executable, "-P", "-m", "torch.distributed.run", *several]

    def _launch(self, launcher: list[str], work: Work) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="graft-") as folder:
            request, answer = Path(folder) / "work", Path(folder) / "outcome"
            request.write_bytes(pickle.dumps(work))
            # stdin stays open as long as this process lives: its end tells the others to stop
            self._process = subprocess.Popen(
                [*launcher, "-m", "graft._launched", str(request), str(answer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            code = self._process.wait()
            left = [pickle.loads(path.read_bytes()) for path in sorted(Path(folder).glob("outcome.[0-9]*"))]
        failures = [outcome for outcome in left if isinstance(outcome, Failure)]
        made = [outcome for outcome in left if isinstance(outcome, Manifest)]
        said = f"its processes ended early (exit status {code}): what `{shlex.join(launcher)}` said stands above"
        nothing = Failure(f"{said}; run again to go on", 1, "")
        return (made or failures or [nothing])[0]

    def close(self) -> None:
        """Stop the processes, if some are under way, and wait for their end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


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
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | share_of_cores(self.slots),
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


class Launched(Here):
    """Makes one node at a time; what trains, in the processes that a launcher such as `torchrun` starts together."""

    def __init__(self, command: str):
        super().__init__()
        words = shlex.split(command) or [""]
        found = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent))
        if found is None:
            raise RequestError(
                f"expected a launcher such as 'torchrun --nproc-per-node 2', found no program {words[0]!r}"
            )
        words = spelt_out(words)
        self._command = [found, *words[1:]]
        self.processes = processes_of(words)
        """How many train a model together, where the command tells."""

    def _launcher(self, work: Work) -> list[str]:
        return self._command


EACH_MACHINE, MACHINES = "nproc-per-node", "nnodes"
"""Options of torchrun: processes on a machine, and machines; one where nothing is said."""
IN_ALL = ("num-processes", "ntasks", "np", "n")
"""Options of other launchers (accelerate, srun, mpirun) for processes on all machines together."""


def spelt_out(words: Sequence[str]) -> list[str]:
    """A launcher's command with `--nproc`, which torchrun takes for short of two spellings of one option, in full."""
    if Path(words[0]).name != "torchrun" and "torch.distributed.run" not in words:
        return list(words)
    return [re.sub(r"^--nproc(?==|$)", f"--{EACH_MACHINE}", word) for word in words]


def processes_of(words: Sequence[str]) -> int | None:
    """How many processes a launcher's command starts, on all machines; None where its words do not tell."""
    options: dict[str, str] = {}
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            options[name.lstrip("-").replace("_", "-")] = value if equals else following
    if EACH_MACHINE in options or Path(words[0]).name == "torchrun":
        said = [options.get(name, "1") for name in (EACH_MACHINE, MACHINES)]
    else:
        said = [next((options[name] for name in IN_ALL if name in options), "")]
    return math.prod(map(int, said)) if all(value.isdecimal() for value in said) else None


def parallel_of(settings: Settings) -> Parallel | None:
    """How several processes train a node with these settings together; None where they say nothing."""
    return settings.parallel if isinstance(settings, TrainSettings) else None


def misplaced(executor: Executor, name: str, settings: Settings) -> str | None:
    """Why a node cannot be trained by this executor as its settings say; None where it can."""
    parallel = parallel_of(settings)
    if parallel is None:
        return None
    if isinstance(executor, Processes):
        return (
            f"{name}: expected several models side by side (jobs) or several processes a model "
            f"(`parallel: {parallel.method}`), found both"
        )
    if isinstance(executor, Launched) and (wrong := _miscounted(executor.processes, parallel)):
        return f"{name}: {wrong}"
    alone = isinstance(executor, Here) and not isinstance(executor, Launched)
    if alone and parallel.devices is None and parallel.offload is None:
        return (
            f"{name}: `parallel: {parallel.method}` needs several processes: say how many on this machine "
            "(`parallel.devices: 2`), or what starts them (`launch='torchrun --nproc-per-node 2'`, --launch)"
        )
    if alone and (parallel.devices or 1) > (most := max(SIDE_BY_SIDE, os.cpu_count() or 1)):
        return (
            f"{name}: expected at most {most} processes on this machine, found `parallel.devices: {parallel.devices}`: "
            "more machines are told to a launcher (`launch`, --launch)"
        )
    return None


SIDE_BY_SIDE = 8
"""Guess: so many processes train beside each other even on a machine of fewer cores."""


def _miscounted(processes: int | None, parallel: Parallel) -> str:
    """Why a launcher's number of processes is not that which the settings ask for; empty where it is, or not known."""
    if processes is None:
        return ""
    if parallel.devices not in (None, processes):
        return f"expected {parallel.devices} processes (`parallel.devices`), found a launcher of {processes}"
    if processes % parallel.tensor:
        return f"expected processes in groups of {parallel.tensor} (`parallel.tensor`), found a launcher of {processes}"
    return ""
