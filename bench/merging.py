"""Merging beside mergekit and `cp`: whole processes, seconds and resident memory, bfloat16 models, page cache warm.

    sh bench/venv_mergekit.sh
    python bench/merging.py [--sizes 1.1B] [--models 3] [--methods linear ties] [--repeats 3] [--warmup 1] [--alone]
    python bench/merging.py --alone --methods linear --sizes 0.1B 0.4B 1.1B 3B --models 3 --remove
    python bench/merging.py --alone --methods linear --sizes 1.1B --models 2 4 6 8

`graft` is the first merge of its models, for which nothing is kept but its own machine code; `graft, again` a later
one, for which hashes of the models and what their architecture must hold are kept too.

`--sizes` and `--models` may be several: how time grows. `--alone` leaves mergekit out. `cp` reads all the bytes that a
merge reads and writes as many. A last table has a line for each method, size and number of models, with its floor: the
bytes that it moves (tensors that are read twice count twice) at the speed at which `cp` moved its own; `work` is what a
later merge took by its manifest, without Python's start and the checks of the request. The family (one base and so many
models) is made when it is needed and stays in bench/work/merging for the next run, or goes with `--remove` when its
size is done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from _merging_family import WIDTHS, bytes_of, family, files_of
from _side_by_side import Measured, Side, json_of, measure, report

HERE = Path(__file__).resolve().parent
MERGEKIT = HERE / ".venv-mergekit" / "bin" / "mergekit-yaml"
GRAFT = Path(sys.executable).parent / "graft"


@dataclass(frozen=True)
class Case:
    """One method with settings that mean the same on both sides."""

    goal: float
    """Times faster than mergekit."""
    base: bool = True
    count: int | None = None
    """Models it takes, where it does not take any number."""
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    each: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    """How often all inputs are read at least: what has to be measured over a tensor first takes one of its own."""


HALF = {"density": 0.5}
CASES = {
    "linear": Case(7, base=False, each={"weight": 1}),
    "slerp": Case(5, base=False, count=2, ours={"t": 0.5}, theirs={"t": 0.5}, passes=2),
    "task_arithmetic": Case(5, each={"weight": 1}),
    "model_stock": Case(5, passes=2),
    "karcher": Case(10, base=False, passes=2),
    "dare_ties": Case(20, ours=HALF, each=HALF | {"weight": 1}),
    "ties": Case(30, ours=HALF, each=HALF | {"weight": 1}, passes=2),
    "della": Case(30, ours=HALF | {"epsilon": 0.15}, each=HALF | {"weight": 1, "epsilon": 0.15}),
}


WATCH = """
import json, subprocess, sys, tempfile, threading, time

def held(process):
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            own = sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        with open(f"/proc/{process}/task/{process}/children") as file:
            return own + sum(map(held, file.read().split()))
    except (OSError, IndexError):
        return 0

with tempfile.TemporaryFile() as said:
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=said)
    ended, most = threading.Event(), [0]

    def look():
        while not ended.wait(0.1):
            most.append(held(process.pid))

    watching = threading.Thread(target=look)
    watching.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    ended.set()
    watching.join()
    said.seek(0)
    sys.stderr.buffer.write(said.read())
print(json.dumps({"seconds": seconds, "held": max(most) / 1000}))
sys.exit(status)
"""
"""Runs a command and looks, ten times a second, what it and the processes that it has started hold in memory together:
the sum of their proportional set sizes, in which a page that several share counts once."""


@dataclass
class Process:
    """A command run whole. Calling it gives seconds; the most that it held in memory (MB, with the processes that it
    started, mapped files too) is kept."""

    command: Sequence[str | Path]
    out: Path
    kept: Path | None = None
    """Where graft keeps what it found out and its machine code."""
    first: bool = False
    """Whether what it found out about models is forgotten before each run."""
    held: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)
    """Seconds by graft's own manifest."""

    def __call__(self) -> float:
        """Run it, without anything that an earlier run wrote; twice the first time, where something is kept."""
        if self.kept is not None and not self.held:
            self._run()
        found = self._run()
        self.held.append(found["held"])
        if (self.out / "graft.json").is_file():
            self.worked.append(json.loads((self.out / "graft.json").read_text())["seconds"])
        # what is read next keeps its place in memory
        shutil.rmtree(self.out)
        return found["seconds"]

    def _run(self) -> dict[str, float]:
        for left in (self.out, self.out.parent / ".graft"):
            shutil.rmtree(left, ignore_errors=True)
        if self.kept is not None and self.first:
            for found in ("hashes", "architectures"):
                shutil.rmtree(self.kept / found, ignore_errors=True)
        # what others wrote is on the disk before the clock starts
        os.sync()
        kept = "" if self.kept is None else str(self.kept)
        return json_of([sys.executable, "-I", "-S", "-c", WATCH, *self.command], GRAFT_CACHE=kept)


def ours(
    method: str, case: Case, folders: dict[str, Path], names: Sequence[str], out: Path, kept: Path, first: bool = False
) -> Process:
    """`graft merge` of the models."""
    settings = case.ours | ({"base": folders["base"]} if case.base else {})
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [GRAFT, "merge", out, *(folders[n] for n in names), f"--method={method}", *options, "--json"]
    return Process(command, out, kept, first)


def theirs(method: str, case: Case, folders: dict[str, Path], names: Sequence[str], out: Path) -> Process:
    """`mergekit-yaml` of the same models."""
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folders[name]), "parameters": case.each} for name in names],
        "parameters": case.theirs,
        "dtype": "bfloat16",
    }
    if case.base or method == "slerp":
        config["base_model"] = str(folders["base" if case.base else names[0]])
    written = out.parent / f"{method}.yaml"
    written.write_text(yaml.safe_dump(config))
    return Process([MERGEKIT, written, out, "--quiet", "--random-seed", "0"], out)


def copying(case: Case, folders: dict[str, Path], names: Sequence[str], out: Path) -> Process:
    """One model copied, the others read."""
    read = [str(f) for n in names for f in files_of(folders[n])] + (
        [str(f) for f in files_of(folders["base"])] if case.base else []
    )
    first, *others = read
    rest = f" && cat {shlex.join(others)} > /dev/null" if others else ""
    return Process(["sh", "-c", f"mkdir {shlex.quote(str(out))} && cp {shlex.quote(first)} {out}/{rest}"], out)


def room(work: Path, size: str, models: int) -> None:
    """Stops where the disk has no room for the family and two outputs; says where memory cannot hold it."""
    needed = bytes_of(size) * (models + 3)
    there = sum(p.stat().st_size for p in (work / size).rglob("*.safetensors"))
    free = shutil.disk_usage(work).free + there
    if free < 1.2 * needed:
        raise SystemExit(f"{work}: needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free")
    if (memory := psutil.virtual_memory().available) < needed:
        print(
            f"memory ({memory / 1e9:.1f} GB) cannot hold {needed / 1e9:.1f} GB: files come from disk", file=sys.stderr
        )


@dataclass(frozen=True)
class Grown:
    """A line of the table of growth."""

    method: str
    size: str
    models: int
    moved: float
    """Bytes that have to be read and written."""
    floor: float
    """Seconds for these at the speed at which `cp` moved its own."""
    seconds: float
    again: float
    """Seconds of a later merge."""
    work: float
    """Of which its manifest tells."""
    copied: float
    """Seconds that `cp` took."""
    held: float


def grown(method: str, size: str, models: int, seconds: Sequence[Measured], work: float, held: float) -> Grown:
    """What one comparison, ours first (the first and a later one) and `cp` last, says about growth."""
    case = CASES[method]
    read = bytes_of(size) * (models + case.base)
    moved = case.passes * read + bytes_of(size)
    copied = seconds[-1].median
    floor, ours_ = moved * copied / (read + bytes_of(size)), [each.median for each in seconds[:2]]
    return Grown(method, size, models, moved, floor, *ours_, work, copied, held)


def table(lines: Sequence[Grown]) -> str:
    """All lines, as Markdown."""
    names = ("method", "size", "models", "moved, GB", "floor, s", "graft, s", "again, s", "work, s", "work / floor")
    head = f"| {' | '.join(names)} | cp, s | graft, MB |\n"
    rows = (
        f"| {one.method} | {one.size} | {one.models} | {one.moved / 1e9:.2f} | {one.floor:.2f} | {one.seconds:.2f} | "
        f"{one.again:.2f} | {one.work:.2f} | {one.work / one.floor:.1f} | {one.copied:.2f} | {one.held:.0f} |"
        for one in lines
    )
    return head + "|---" * 11 + "|\n" + "\n".join(rows)


def compare(method: str, size: str, models: int, work: Path, repeats: int, warmup: int, alone: bool) -> Grown:
    """Rows for one method: seconds, then memory."""
    room(work, size, models)
    folders, case = family(work, size, models), CASES[method]
    names = list(folders)[1 : 1 + (case.count or models)]
    out = work / "out"
    made = {
        "graft": ours(method, case, folders, names, out / "graft", work / f"first-{size}", first=True),
        "graft, again": ours(method, case, folders, names, out / "again", work / f"kept-{size}"),
    }
    out.mkdir(exist_ok=True)
    if not alone:
        made["mergekit 0.1.5"] = theirs(method, case, folders, names, out / "mergekit")
    made["cp"] = copying(case, folders, names, out / "cp")
    sides = [Side(name, process) for name, process in made.items()]
    seconds = measure(sides, repeats, warmup)
    what = f"merge {method}, {len(names)} models of {size} in bfloat16"
    report(what, seconds, "s")
    report(f"{what}, memory", [Measured(n, tuple(p.held[-repeats:])) for n, p in made.items() if n != "cp"], "MB")
    if not alone:
        first, again, theirs_ = (measured.median for measured in seconds[:3])
        times = {"faster": round(theirs_ / first, 2), "again": round(theirs_ / again, 2), "goal": case.goal}
        print(json.dumps({"method": method} | times), file=sys.stderr)
    shutil.rmtree(out)
    held = statistics.median(made["graft"].held[-repeats:])
    return grown(method, size, len(names), seconds, statistics.median(made["graft, again"].worked[-repeats:]), held)


def main() -> None:
    """Two rows for each method, size and number of models; then the table of growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", "--size", nargs="+", choices=WIDTHS, default=["1.1B"])
    parser.add_argument("--models", nargs="+", type=int, default=[3])
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before that do not count")
    parser.add_argument("--alone", action="store_true", help="without mergekit")
    parser.add_argument("--remove", action="store_true", help="remove each size's family when it is done")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "merging")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lines: list[Grown] = []
    for size in args.sizes:
        for models, method in itertools.product(args.models, args.methods):
            lines += [compare(method, size, models, args.work, args.repeats, args.warmup, args.alone)]
        if args.remove:
            for left in (size, f"first-{size}", f"kept-{size}"):
                shutil.rmtree(args.work / left, ignore_errors=True)
    print(table(lines))


if __name__ == "__main__":
    main()
