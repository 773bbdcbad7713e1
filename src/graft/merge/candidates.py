"""Merges that are judged and not kept: made in the memory of one loaded model by the engine, as if they were written.

What was judged is noted in the job's scratch folder at once, so that after a kill no merge is judged twice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft import models
from graft.checkpoint import TORCH_NAMES, WIDTH, TensorHeader, TensorReader, TensorWriter
from graft.errors import GraftError, RunError
from graft.evaluate.judge import Judge
from graft.evaluate.results import Results, key_of
from graft.evaluate.unseen import check_unseen
from graft.hashing import hash_file
from graft.machine import share_of_cores
from graft.merge.engine import files_beside, prepare, stamps, stream
from graft.merge.inputs import Input, inputs
from graft.merge.judged import Judged
from graft.merge.naming import is_dead
from graft.merge.preflight import Layout, layout
from graft.merge.prepared import Prepared
from graft.merge.related import unrelated
from graft.merge.settings import MergeSettings
from graft.merge.stream import Workers
from graft.progress import say
from graft.verb import Job

Verdict = Callable[[MergeSettings, int], float | None]
"""The metric of a merge with a seed."""

WRITTEN = "merge"
"""The folder, in a seat's own, of the merge that is written and loaded."""
VERSION = 1
"""Counted up when the same merge gets another verdict."""


class InMemory(TensorWriter):
    """Takes what the engine writes into the tensors of a model.

    A tensor that lies in this machine's memory in the type of the merge is written into directly, another one through
    a copy that `close` brings over.
    """

    def __init__(self, targets: Mapping[str, Tensor], tensors: Mapping[str, tuple[str, tuple[int, ...]]]):
        self.headers, self._bytes, self._copies = {}, {}, []
        for name, (dtype, shape) in tensors.items():
            target = targets[name]
            size = target.numel() * WIDTH[dtype]
            self.headers[name] = TensorHeader(name, dtype, shape, Path("memory"), 0, size)
            stored = getattr(torch, TORCH_NAMES[dtype])
            held = target
            if target.dtype != stored or target.device.type != "cpu" or not target.is_contiguous():
                held = torch.empty(shape, dtype=stored)
                self._copies.append((target, held))
            self._bytes[name] = memoryview(held.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def write(self, name: str, start: int, piece: memoryview | bytes) -> None:
        """Put `piece` at byte `start` of the tensor."""
        view = memoryview(piece).cast("B")
        self._bytes[name][start : start + len(view)] = view

    @torch.no_grad()
    def close(self) -> None:
        """Bring over what could not be written in place."""
        for target, held in self._copies:
            target.copy_(held)


class Seat:
    """One model in memory that becomes one merge after the other; the first is written to `folder` and loaded.

    Where what is loaded is not tensor for tensor what was written (a conversion while loading), every merge is written
    and loaded. Use with `with`, after which nothing of it is left on the disk.
    """

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self.model: Any = None
        self.tokenizer: Any = None
        self._made: tuple[Any, ...] | None = None
        self._targets: dict[str, Tensor] | None = None
        self._opened = ExitStack()
        self._readers: dict[tuple[Any, ...], TensorReader] = {}

    def take(self, settings: MergeSettings, seed: int | None = None) -> None:
        """Make `model` and `tokenizer` those of this merge. Raises what the merge itself would raise.

        What was measured for the whole search is found in the scratch that `folder` lies in.
        """
        job = replace(self.job, settings=settings, seed=self.job.seed if seed is None else seed, scratch=self.folder)
        with ExitStack() as opened:
            prepared = prepare(job, settings)
            if hasattr(prepared.survey, "close"):
                opened.callback(prepared.survey.close)
            self._take(prepared, job)

    def _take(self, prepared: Prepared, job: Job) -> None:
        settings, folders = prepared.settings, prepared.models or job.models
        plan = layout(settings, folders)
        parts = inputs(settings, folders)
        readers = {name: self._reader(part) for name, part in parts.items()}
        first = parts[settings.parents[0]]
        beside = [hash_file(path) for path in first.companions.values()]
        made = (dict(plan.tensors), plan.config, beside)
        if self._made != made or self._targets is None:
            self._load(settings, job, plan, readers, first, prepared.survey)
            self._made = made
            return
        writer = InMemory(self._targets, plan.tensors)
        _stream(settings, job, plan, readers, writer, prepared.survey)

    def _reader(self, part: Input) -> TensorReader:
        # what its tensors are called hangs on the other parents of the candidate
        asked = (part, *sorted(part.names.items()))
        if asked not in self._readers:
            self._readers[asked] = self._opened.enter_context(part.open())
        return self._readers[asked]

    def _load(
        self,
        settings: MergeSettings,
        job: Job,
        plan: Layout,
        readers: Mapping[str, TensorReader],
        first: Input,
        survey: Any,
    ) -> None:
        self.model = self._targets = None
        place = self.folder / WRITTEN
        # a new file each time: the memory of a loaded model may be the file that it came from
        _clear(self.folder)
        place.mkdir(parents=True)
        files_beside(plan, first, place)
        _stream(settings, job, plan, readers, TensorWriter(place, plan.tensors, settings.shard), survey)
        device = self.job.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = models.load(place, device=device), models.load_tokenizer(place)
        names, state = stored_names(self.model, place), self.model.state_dict()
        self._targets = None if names is None else {stored: state[name] for stored, name in names.items()}

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        _clear(self.folder)


def _clear(folder: Path) -> None:
    """Remove the merge that a seat wrote: nobody asks for it again, and it is as large as a model."""
    shutil.rmtree(folder / WRITTEN, ignore_errors=True)


def stored_names(model: Any, folder: Path) -> dict[str, str] | None:
    """Name in `folder`'s files → name in the model that was loaded from there.

    None where the model does not hold tensor for tensor what is stored.
    """
    state = model.state_dict()
    found = {}
    with TensorReader(folder) as reader:
        for stored in (name for name in reader.names if not is_dead(reader.headers[name])):
            name = stored if stored in state else f"{model.base_model_prefix}.{stored}"
            if name not in state or not torch.equal(state[name].cpu(), reader.read(stored).to(state[name].dtype)):
                return None
            found[stored] = name
    return found if len({state[name].data_ptr() for name in found.values()}) == len(found) else None


def _stream(
    settings: MergeSettings,
    job: Job,
    plan: Layout,
    readers: Mapping[str, TensorReader],
    writer: TensorWriter,
    survey: Any,
) -> None:
    try:
        with Workers(device=job.device or "cpu") as workers:
            stream(settings, job.seed, plan, readers, writer, None, workers, survey)
    finally:
        writer.close()


class Candidates:
    """Judges merges of a job's models. `with Candidates(job, judged) as candidates: candidates.values([…])`.

    `jobs` merges are judged side by side, each in a process of its own where they are several. Raises CannotCombine
    for models that have seen the data in training, and for models that may not be merged.
    """

    def __init__(self, job: Job, judged: Judged, jobs: int = 1):
        self.job, self.judged, self.jobs = job, judged, jobs
        check_unseen(job.models, judged.data, job.data, job.root)
        self.judge = Judge.of(judged.entry(), job.data, job.root, judged.metric)
        self.results = Results(job.scratch / "judged")
        self._opened = ExitStack()
        self._judges: list[Verdict] = []

    def values(self, merges: Sequence[MergeSettings], seeds: Sequence[int] | None = None) -> list[float | None]:
        """The metric of each merge, in order; None where a merge gives no finite number."""
        seeds = [self.job.seed] * len(merges) if seeds is None else seeds
        keys = [self._key(settings, seed) for settings, seed in zip(merges, seeds, strict=True)]
        asked = {key: (settings, seed) for key, settings, seed in zip(keys, merges, seeds, strict=True)}
        new = {key: one for key, one in asked.items() if self.results.get(key) is None}
        for key, value in _judged(self._seats(len(new)), new):
            self.results.append({"key": key, "value": value, "settings": asked[key][0].plain()})
            say(f"{self.job.name}: {self.judge.metric} {'none' if value is None else format(value, '.6g')}")
        return [(self.results.get(key) or {})["value"] for key in keys]

    def losses(self, merges: Sequence[MergeSettings]) -> list[float]:
        """The lower, the better; infinite without a value."""
        sign = -1 if self.judge.higher_is_better else 1
        return [float("inf") if value is None else sign * value for value in self.values(merges)]

    def _key(self, settings: MergeSettings, seed: int) -> str:
        return key_of(
            version=VERSION,
            measure=self.judged.entry().plain(),
            metric=self.judge.metric,
            data=self.judge.content,
            parents=stamps(self.job.models),
            settings=settings.plain(),
            seed=seed,
        )

    def _seats(self, wanted: int) -> list[Verdict]:
        """As many as are of use, opened when they are needed for the first time."""
        if wanted and not self._judges:
            check_parents(self.job)
        while len(self._judges) < min(wanted, self.jobs):
            number = len(self._judges)
            if self.jobs == 1:
                seat = self._opened.enter_context(Seat(self.job, self.job.scratch / "seat"))
                self._judges.append(partial(judged_in, seat, self.judge))
            else:
                helper = _Helper(self.job, self.judged, number, self.jobs)
                self._opened.callback(helper.close)
                self._judges.append(helper.ask)
        return list(self._judges)

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _judged(
    judges: list[Verdict], asked: Mapping[str, tuple[MergeSettings, int]]
) -> Iterator[tuple[str, float | None]]:
    """(key, value) of every merge as soon as it is judged. There are as many threads as judges: one is always free."""
    if len(judges) == 1:
        yield from ((key, judges[0](*one)) for key, one in asked.items())
        return

    def with_one(settings: MergeSettings, seed: int) -> float | None:
        judge = judges.pop()
        try:
            return judge(settings, seed)
        finally:
            judges.append(judge)

    with ThreadPoolExecutor(max(len(judges), 1)) as pool:
        futures = {pool.submit(with_one, *one): key for key, one in asked.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def judged_in(seat: Seat, judge: Judge, settings: MergeSettings, seed: int) -> float | None:
    """The metric of one merge."""
    seat.take(settings, seed)
    return judge.value(seat.model, seat.tokenizer)


def check_parents(job: Job) -> None:
    """Raises CannotCombine for models that may not be merged, before time is spent on judging them."""
    assert isinstance(job.settings, MergeSettings)
    with ExitStack() as opened:
        parts = inputs(job.settings, job.models)
        readers = {name: opened.enter_context(part.open()) for name, part in parts.items()}
        unrelated(job.settings, layout(job.settings, job.models), readers)


class _Helper:
    """Judges in another process, which has its share of the cores and ends with this one."""

    def __init__(self, job: Job, judged: Judged, number: int, jobs: int):
        own = {"GRAFT_QUIET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        own |= share_of_cores(jobs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "graft.merge.candidates"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own,
        )
        self.folder = job.scratch / f"seat-{number}"
        measure = {name: value for name, value in judged.plain().items() if name in Judged.model_fields}
        self._say({"job": _plain(job, self.folder), "judged": measure})

    def ask(self, settings: MergeSettings, seed: int) -> float | None:
        """The metric of one merge. Raises RunError where the other process fails."""
        self._say({"settings": settings.plain(), "seed": seed})
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RunError(f"a process that judges merges ended early (exit status {self.process.wait()}); run again")
        found = json.loads(answer)
        if "error" in found:
            raise RunError(found["error"])
        return found["value"]

    def _say(self, what: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End the process, and remove what it wrote."""
        self.process.kill()
        self.process.communicate()
        _clear(self.folder)


def _plain(job: Job, scratch: Path) -> dict[str, Any]:
    """A job as JSON-ready values."""
    return {
        "name": job.name,
        "settings": job.settings.plain(),
        "seed": job.seed,
        "scratch": str(scratch),
        "cache": str(job.cache),
        "models": {name: str(folder) for name, folder in job.models.items()},
        "data": {name: settings.plain() for name, settings in job.data.items()},
        "root": str(job.root),
        "device": job.device,
    }


def _job(plain: Mapping[str, Any]) -> Job:
    from graft import data
    from graft.merge import VERB

    return Job(
        name=plain["name"],
        settings=VERB.parse(plain["settings"]),
        seed=plain["seed"],
        out=Path(plain["scratch"]),
        scratch=Path(plain["scratch"]),
        cache=Path(plain["cache"]),
        models={name: Path(folder) for name, folder in plain["models"].items()},
        data={name: data.parse(raw, ("data", name)) for name, raw in plain["data"].items()},
        root=Path(plain["root"]),
        device=plain["device"],
    )


def _serve() -> None:
    """Judge the merges that come on stdin, a line each, until it ends."""
    from graft.merge import VERB

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begun = json.loads(sys.stdin.readline())
    job, judged = _job(begun["job"]), Judged.model_validate(begun["judged"])
    judge = Judge.of(judged.entry(), job.data, job.root, judged.metric)
    with Seat(job, job.scratch) as seat:
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer: dict[str, Any] = {"value": judged_in(seat, judge, VERB.parse(asked["settings"]), asked["seed"])}
            except GraftError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
