"""Measure ours beside a peer: alternating runs, medians, a ratio, the machine, and a row for RESULTS.md.

    from _side_by_side import Side, json_of, measure, report, timed

    sides = [Side("graft", timed(ours)), Side("lm-eval 0.4.13", lambda: json_of([PEER_PYTHON, "peer.py"])["seconds"])]
    report("multiple choice, 200 x 4", measure(sides, repeats=5), unit="s", packages=["graft", "torch"])

A run is a function without arguments that gives one number (seconds, bytes, tokens/s …). Runs alternate (a b a b …, the
order turned round every other time), so that a machine that slows down or warms up does so for both.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Side:
    """One of the things compared: its name (for a peer with its version) and a run that gives one number."""

    name: str
    run: Callable[[], float]


@dataclass(frozen=True)
class Measured:
    """The numbers one side gave, in the order they were taken."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)


def measure(sides: Sequence[Side], repeats: int = 5, warmup: int = 1) -> list[Measured]:
    """Each side `repeats` times, alternating, after `warmup` rounds that are not counted; ours comes first."""
    found = in_turn({side.name: lambda run=side.run: float(run()) for side in sides}, repeats, warmup)  # type: ignore[misc]
    return [Measured(name, tuple(values)) for name, values in found.items()]


def in_turn(runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[Any]]:
    """What each run gave, `repeats` times, the order turned round every other time."""
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for round_ in range(-warmup, repeats):
        for name in runs if round_ % 2 == 0 else reversed(runs):
            value = runs[name]()
            shown = f"{value:.6g}" if isinstance(value, float) else value
            print(f"  {'warm-up' if round_ < 0 else f'{round_ + 1}/{repeats}'}  {name}: {shown}", file=sys.stderr)
            if round_ >= 0:
                found[name].append(value)
    return found


CLOCKS = {"s": time.perf_counter, "CPU s": time.process_time}
"""A unit of time → its clock. Time of the CPU, summed over threads, tells also where others work beside."""


def report_times(what: str, works: Mapping[str, Callable[[], Any]], repeats: int, packages: Sequence[str]) -> None:
    """Print a row for each clock: how long each work takes, done in turn."""

    def taken(work: Callable[[], Any]) -> dict[str, float]:
        start = {unit: clock() for unit, clock in CLOCKS.items()}
        work()
        return {unit: clock() - start[unit] for unit, clock in CLOCKS.items()}

    found = in_turn({name: lambda work=work: taken(work) for name, work in works.items()}, repeats)  # type: ignore[misc]
    for unit in CLOCKS:
        measured = [Measured(name, tuple(each[unit] for each in all_)) for name, all_ in found.items()]
        report(what, measured, unit, packages)


def ratio(ours: Measured, theirs: Measured) -> float:
    """Median of ours over median of theirs: below 1 is better for times and bytes, above 1 for rates."""
    return ours.median / theirs.median


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """A run that gives the seconds `work` takes."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def json_of(command: Sequence[str | Path], **environment: str) -> dict[str, Any]:
    """Run a command (a peer in its own virtual environment) and read the JSON object on its last line of output."""
    text = [str(part) for part in command]
    done = subprocess.run(text, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(text)} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def machine() -> str:
    """Processor, cores this process may use, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def versions(packages: Sequence[str]) -> str:
    """`Python 3.12.1, torch 2.13.0, …` as installed in this interpreter."""
    found = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def row(what: str, measured: Sequence[Measured], unit: str, packages: Sequence[str]) -> str:
    """A row of the table in RESULTS.md: what, median (least–most), ratios of ours, command, versions, machine, date."""
    ours, *others = measured
    medians = "; ".join(
        f"{m.name} **{m.median:.4g}** ({min(m.values):.4g}–{max(m.values):.4g}) {unit}" for m in measured
    )
    ratios = "; ".join(f"{ratio(ours, other):.3g} of {other.name}" for other in others)
    command = shlex.join(["python", *sys.argv])
    place = f"{machine()}; {datetime.date.today().isoformat()}"
    return f"| {what} | {medians} | {ratios} | `{command}` | {versions(packages)} | {place} |"


def report(what: str, measured: Sequence[Measured], unit: str, packages: Sequence[str] = ("graft", "torch")) -> None:
    """Print the row on stdout."""
    print(row(what, measured, unit, packages))


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
