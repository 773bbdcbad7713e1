"""Runs a recipe: what is there stays, what is missing is made, everything is measured, and a report is written."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.disk import atomic_write, disk_errors
from graft.errors import CheckpointError, Failure, Locked, RequestError, ScoresFailed, Unfinished
from graft.executors import Executor, Here, Launched, Outcome, Processes, misplaced
from graft.making import Work
from graft.models import check_device
from graft.plan import Places, Plan, Step, make_plan, standing
from graft.plan.fit import launched, too_large, uneven
from graft.plan.keys import data_uses
from graft.plan.places import OneModel
from graft.progress import say
from graft.recipe import Recipe, read_recipe
from graft.verbs import told


@dataclass(frozen=True)
class RunResult:
    """What a run did: `made` and `cached` nodes, the rows that were measured, and where the report is."""

    folder: Path
    plan: Plan
    made: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    report: Path | None = None


class NodesFailed(Unfinished):
    """One or more nodes could not be made; `failures` holds why, by node. What did not hang on them was made."""

    def __init__(self, failures: Mapping[str, Failure], left_out: Collection[str], done: Any):
        self.left_out = list(left_out)
        more = [f"not made, because they hang on what failed: {', '.join(left_out)}"] if left_out else []
        super().__init__(failures, done, more)


def run(
    recipe: Path | str,
    out: Path | str | None = None,
    *,
    only: Collection[str] = (),
    force: Collection[str] = (),
    dry_run: bool = False,
    jobs: int = 1,
    launch: str | None = None,
    wait: bool = True,
    verify: bool = False,
    device: str | None = None,
    executor: Executor | None = None,
) -> RunResult:
    """Run a recipe into `out` (`runs/<family>` if not given) and return what was done.

    `only`: these nodes and what they need. `force`: these are made anew. `jobs`: nodes side by side. `launch`: the
    command that starts several processes to train one model together, such as `torchrun --nproc-per-node 2`. `wait`:
    wait for another run on the same folder rather than refuse. `verify`: hash the weights of everything that is there.
    Raises RequestError for what is wrong with the request, and when all else is done NodesFailed where a node could not
    be made, ScoresFailed where only scores are missing; `done` of these is the RunResult.
    """
    check_device(device)
    executor = executor or executor_for(jobs, launch)
    family = read_recipe(recipe)
    places = Places(Path(out) if out is not None else Path("runs") / family.family)
    if dry_run:
        return RunResult(places.folder, make_plan(family, places, only=only, force=force, verify=verify))
    _check_copy(places, family.text)
    with locked(places, wait=wait):
        plan = make_plan(family, places, only=only, force=force, verify=verify)
        atomic_write(places.folder / "recipe.yaml", family.text)
        failed: NodesFailed | None = None
        names: Collection[str] = plan.steps
        try:
            made, cached = execute(plan, executor, device=device)
        except NodesFailed as error:
            # what was made is measured all the same: the failure is told when that is done
            failed, (made, cached), names = error, error.done, _standing(plan)
        rows, missing = _measured(plan, device, names)
        report = importlib.import_module("graft.report").write_report(places.folder)
    done = RunResult(places.folder, plan, made, cached, rows, report)
    if failed is not None:
        raise NodesFailed({**failed.failures, **missing}, failed.left_out, done)
    if missing:
        raise ScoresFailed(missing, done)
    return done


def _check_copy(places: Places, text: str) -> None:
    """Raises RequestError where the copy of the recipe that a run keeps would replace a file which is not its own."""
    there = places.folder / "recipe.yaml"
    ran = places.lock.exists() or places.models.is_dir()
    if not ran and there.is_file() and there.read_text(encoding="utf-8", errors="replace") != text:
        raise RequestError(
            f"expected the folder of a run or an empty one, found {there}, which no run put there: choose another"
        )


def executor_for(jobs: int = 1, launch: str | None = None) -> Executor:
    """The executor for `jobs` nodes side by side, or each by what `launch` starts. Raises RequestError for misfits."""
    if jobs < 1:
        raise RequestError(f"expected at least one job at a time, found {jobs}")
    if launch is not None and jobs > 1:
        raise RequestError(
            "expected several models side by side (jobs) or several processes a model (launch), found both"
        )
    if launch is not None:
        return Launched(launch)
    return Here() if jobs == 1 else Processes(jobs)


@contextmanager
def locked(places: Places, *, wait: bool, trains: bool = True) -> Iterator[None]:
    """Hold the run's folder. Raises Locked where another run holds it and this one is not to wait.

    `trains`: what is done there may be training, for which several processes can be started.
    """
    from filelock import FileLock, Timeout

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        way = "start it without torchrun"
        if trains:
            way = "it starts the others itself: say `launch='torchrun --nproc-per-node 2'` (--launch)"
        raise RequestError(f"expected one process, found several (torchrun): this is done by one; {way}")
    with disk_errors(places.folder):
        try:
            places.folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise RequestError(f"{places.folder}: a folder cannot be made there ({error.strerror})") from None
        except (FileExistsError, NotADirectoryError):
            raise RequestError(f"{places.folder}: expected a folder or room for one, found a file there") from None
        lock = FileLock(places.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise Locked(
                    f"another run works on {places.folder}: wait for its end, or run into another folder"
                ) from None
            say(f"another run works on {places.folder}; waiting for its end (Ctrl-C stops)")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def execute(plan: Plan, executor: Executor, *, device: str | None = None) -> tuple[list[str], list[str]]:
    """Make what is missing, parents first; (made, cached). What does not hang on a failed node is made all the same.

    Raises CheckpointError for artifacts that were changed after they were made, RequestError for nodes that this
    executor cannot make as they say and trainings that do not fit into the memory, NodesFailed for nodes that failed:
    `done` is (made, cached).
    """
    if plan.damaged:
        raise CheckpointError("\n".join(plan.damaged))
    to_make = [step.node for step in plan.steps.values() if step.state != "cached"]
    if wrong := [why for node in to_make if (why := misplaced(executor, node.name, node.settings))]:
        raise RequestError("\n".join(wrong))
    try:
        _check_room(plan, executor, device)
        return _Course(plan, executor, device).follow()
    finally:
        executor.close()


def _check_room(plan: Plan, executor: Executor, device: str | None) -> None:
    """Raises RequestError for trainings that are to run and need more memory than there is, before anything loads, and
    for rows that the processes of a launcher cannot share out.

    Where a launcher starts several processes, for what one of them needs; of one that does not tell how many it starts
    nothing is known.
    """
    if isinstance(executor, Launched):
        if executor.processes is None:
            return
        plan = launched(plan, executor.processes)
        if wrong := uneven(plan):
            raise RequestError(wrong)
    if wrong := too_large(plan, device):
        raise RequestError(wrong)


class _Course:
    """The state of one execution of a plan."""

    def __init__(self, plan: Plan, executor: Executor, device: str | None):
        self.plan, self.executor, self.device = plan, executor, device
        self.waiting = dict(sorted(plan.steps.items(), key=lambda item: not item[1].node.verb.comes_first))
        self.running: dict[Future[Outcome], str] = {}
        self.done = set(plan.recipe.outside)
        self.made: list[str] = []
        self.cached: list[str] = []
        self.failures: dict[str, Failure] = {}

    def follow(self) -> tuple[list[str], list[str]]:
        while self._start_ready() or self.running:
            finished, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in finished:
                self._finish(self.running.pop(future), future.result())
        if self.failures:
            raise NodesFailed(self.failures, list(self.waiting), (self.made, self.cached))
        return self.made, self.cached

    def _start_ready(self) -> bool:
        """Start what can start; whether anything was started or found to be there."""
        for name, step in list(self.waiting.items()):
            if len(self.running) >= self.executor.slots:
                return True
            if all(model in self.done for model in step.node.models):
                del self.waiting[name]
                if standing(step, self.plan):
                    self.cached.append(name)
                    self.done.add(name)
                    return self._start_ready()
                say(f"{name}: {step.node.verb.name}{' of ' + ', '.join(step.node.models) if step.node.models else ''}")
                self.running[self.executor.submit(_work(self.plan, step, self.device))] = name
        return bool(self.running)

    def _finish(self, name: str, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            self.failures[name] = outcome
            say(f"{name}: failed")
        else:
            self.done.add(name)
            self.made.append(name)
            say(f"{name}: done in {outcome.seconds:.1f} s")
            if not isinstance(self.plan.places, OneModel):
                # a command that makes one model tells of it on stdout
                for line in told(outcome):
                    say(f"{name}: {line}")


def _work(plan: Plan, step: Step, device: str | None) -> Work:
    node, recipe = step.node, plan.recipe
    return Work(
        name=node.name,
        verb=node.verb.name,
        settings=node.settings,
        seed=node.seed,
        key=step.key,
        facts=step.facts,
        target=plan.folder(node.name).absolute(),
        work=plan.places.work(node.name).absolute(),
        cache=plan.places.cache.absolute(),
        models={name: plan.folder(name).absolute() for name in node.models},
        data=recipe.data,
        uses=tuple(data_uses(recipe, node)),
        root=recipe.root,
        device=device,
        fresh=step.forced,
    )


def _standing(plan: Plan) -> list[str]:
    """The models that are there after some could not be made."""
    return [name for name, step in plan.steps.items() if standing(step, plan)]


def _measured(
    plan: Plan, device: str | None, names: Collection[str]
) -> tuple[list[Mapping[str, Any]], Mapping[str, Failure]]:
    """The rows, and why others are missing."""
    recipe: Recipe = plan.recipe
    if not recipe.evaluate or not names:
        return [], {}
    try:
        rows = importlib.import_module("graft.evaluate").evaluate(
            {name: plan.folder(name) for name in names},
            recipe.evaluate,
            data=recipe.data,
            root=recipe.root,
            out=plan.places.folder,
            seed=recipe.seed,
            device=device,
        )
    except ScoresFailed as error:
        return error.done, error.failures
    return rows, {}
