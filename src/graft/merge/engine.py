"""The merge engine: all parents streamed through a method's rule into one folder.

    headers and configurations (preflight) → layout of the output → each tensor in pieces, on all cores → files beside

Nothing is written before everything that headers can tell has been checked. What is held in memory are a few pieces a
core, whatever the size of the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graft.checkpoint import FLOATS, TensorReader, TensorWriter
from graft.disk import atomic_write
from graft.errors import RequestError
from graft.folders import copy_companions, read_json
from graft.hashing import Digests
from graft.merge.architecture import Check, verify
from graft.merge.inputs import Input, inputs, once, unpickled
from graft.merge.journal import Journal
from graft.merge.preflight import Layout, layout
from graft.merge.prepared import Prepared
from graft.merge.related import unrelated
from graft.merge.settings import MergeSettings
from graft.merge.stream import Piece, Source, Tensors, Workers, Writer, copy_whole_numbers
from graft.merge.varying import by_tensor
from graft.merge.vocabulary import aligned, with_special
from graft.methods import method
from graft.progress import Progress
from graft.verb import Job

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 8
"""Tensors worked on at the same time, so that no core waits for the last piece of one."""


def run(job: Job) -> dict[str, Any]:
    """Write the merged model's folder into `job.out`; returns the notes for the manifest."""
    settings = job.settings
    assert isinstance(settings, MergeSettings)
    check_precision(settings, job.device)
    once(settings, job.models)
    chosen = method("graft.merge", settings.method)
    job = replace(job, models=unpickled(settings, job.models, job.cache))
    if hasattr(chosen, "make"):
        return chosen.make(job, settings)
    asked, prepared = settings.seeds, prepare(job, settings)
    settings, folders = prepared.settings, prepared.models or job.models
    plan = layout(settings, folders)
    plan.notes.update(prepared.notes)
    parts = inputs(settings, folders)
    with ExitStack() as opened:
        if hasattr(prepared.survey, "close"):
            opened.callback(prepared.survey.close)
        readers = {name: opened.enter_context(part.open()) for name, part in parts.items()}
        forced = [*plan.forced, *unrelated(settings, plan, readers)]
        files_beside(plan, parts[settings.parents[0]], job.out)
        fits = fitting(plan, job, opened)
        writer = TensorWriter(job.out, plan.tensors, settings.shard, resume=True)
        opened.callback(writer.close)
        homes = {name: part.home for name, part in parts.items()}
        what = {"settings": settings.plain(), "seed": job.seed, "parents": stamps(folders), "homes": stamps(homes)}
        journal = Journal(job.scratch / "finished", what, job.out)
        # opened last and so closed first: no thread works on files that are closed
        workers = opened.enter_context(Workers(device=job.device or "cpu"))
        digests = Digests(writer)
        stream(settings, job.seed, plan, readers, digests, journal, workers, prepared.survey, fits)
        plan.notes["verified_as"] = fits.result()
        digests.finish()
        if asked is not None:
            from graft.merge.seeds import spread

            plan.notes["seeds"] = spread(job, asked, settings, plan, readers, prepared.survey, workers)
    if asked is not None:
        from graft.merge.seeds import scores

        plan.notes["seeds"] |= scores(job, asked, settings, folders)
    return {"notes": plan.notes, "forced": forced}


def fitting(plan: Layout, job: Job, opened: ExitStack) -> Future[str]:
    """What the output was checked against; found out beside the work, which ends where it does not fit."""
    beside = opened.enter_context(ThreadPoolExecutor(1))
    check = Check(job.out, job.cache)
    # ended before anybody waits for it
    opened.callback(check.close)
    shapes = {name: shape for name, (_, shape) in plan.tensors.items()}
    return beside.submit(lambda: verify(check.found(), shapes))


def check_precision(settings: MergeSettings, device: str | None) -> None:
    """Raises RequestError for a device that cannot work in float64 where the method does."""
    if settings.in_float64 and (device or "").startswith("mps"):
        raise RequestError(
            f"expected a device with float64 for {settings.method} as it is asked for, found {device}: "
            "use `device='cpu'` (--device cpu)"
        )


def prepare(job: Job, settings: MergeSettings) -> Prepared:
    """What is found out before the merge: the best parameters, where they are searched, then what the method asks."""
    if settings.search is not None:
        from graft.merge.search import search

        found, noted = search(job, settings)
        prepared = prepare(job, found)
        return replace(prepared, notes={**prepared.notes, "search": noted})
    chosen = method("graft.merge", settings.method)
    return chosen.prepare(job, settings) if hasattr(chosen, "prepare") else Prepared(settings)


def stream(
    settings: MergeSettings,
    seed: int,
    plan: Layout,
    readers: Mapping[str, TensorReader],
    writer: Writer,
    journal: Journal | None,
    workers: Workers,
    survey: Any = None,
    fits: Future[str] | None = None,
) -> None:
    """Make every tensor that the journal does not know yet. `survey` is what the method found out beforehand; what
    `fits` raises ends the work as soon as it is known."""
    chosen = method("graft.merge", settings.method)
    own = by_tensor(settings, {name: place for name, place in plan.places.items() if name not in plan.copied})
    sources = aligned(readers, plan.vocabulary, plan.places)
    every = {name: _tensors(name, plan, settings, sources, workers, seed, chosen) for name in plan.tensors}
    # of a tensor without elements nothing can be measured, and there is nothing to write
    full = {name: tensors for name, tensors in every.items() if tensors.count}
    floats = {name: tensors for name, tensors in full.items() if plan.tensors[name][0] in FLOATS}
    if survey is None and hasattr(chosen, "survey"):
        found = chosen.survey([tensors for name, tensors in floats.items() if name not in plan.copied], settings)
        floats = {name: replace(tensors, survey=found) for name, tensors in floats.items()}
    elif survey is not None:
        floats = {name: replace(tensors, survey=survey) for name, tensors in floats.items()}
    made = [name for name in plan.tensors if journal is None or name not in journal.finished]

    def one(name: str) -> int:
        size = writer.headers[name].end - writer.headers[name].start
        if name in floats:
            merged = floats[name].models and name not in plan.copied
            rule = chosen.rule(floats[name], own[name]) if merged else _alone
            floats[name].write(rule, writer)
        elif name in full:
            copy_whole_numbers(full[name], writer)
        if journal is not None:
            journal.note(name, size)
        return size

    total = sum(writer.headers[n].end - writer.headers[n].start for n in made)
    with Progress("merging", total, "B") as progress, ThreadPoolExecutor(AT_ONCE) as several:
        futures = [several.submit(one, name) for name in made]
        try:
            for future in futures:
                progress.advance(future.result())
                if fits is not None and fits.done():
                    fits.result()
        except BaseException:
            several.shutdown(wait=True, cancel_futures=True)
            raise


def _alone(piece: Piece) -> Tensor:
    """What only one parent has a part in, the base or the first model, is taken from it."""
    return piece.models[0] if piece.base is None else piece.base


def _tensors(
    name: str,
    plan: Layout,
    settings: MergeSettings,
    readers: Mapping[str, TensorReader],
    workers: Workers,
    seed: int,
    chosen: ModuleType,
) -> Tensors:
    short = short_names(settings.parents)
    sources = {model: Source(model, readers[model], at, short[model]) for model, at in plan.places[name].items()}
    base = sources[settings.base_name] if settings.base_name is not None else None
    models = [sources[model] for model in settings.names if model in sources]
    by_rows = getattr(chosen, "by_rows", lambda settings: False)(settings)
    return Tensors(name, plan.tensors[name][1], models, base, workers, seed, by_rows)


def short_names(parents: Sequence[str]) -> dict[str, str]:
    """Of every parent what stands at the end of its path, where that tells them apart; else what it is called."""
    ends = {name: Path(name).name or name for name in parents}
    return ends if len(set(ends.values())) == len(ends) else {name: name for name in parents}


def files_beside(plan: Layout, parent: Input, out: Path) -> None:
    """Configuration, generation configuration, tokenizer and chat template, all of the first parent."""
    atomic_write(out / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
    new = plan.vocabulary.tokenizer if plan.vocabulary is not None else None
    plan.notes["files_taken"] = copy_companions(parent.companions, out, stale=new is None)
    if new is not None:
        atomic_write(out / "tokenizer.json", json.dumps(new, indent=2, ensure_ascii=False))
    if plan.vocabulary is not None and plan.vocabulary.special:
        path = out / "tokenizer_config.json"
        said = read_json(path, "tokenizer's settings") if path.is_file() else {}
        whole = with_special(said, plan.vocabulary.special)
        atomic_write(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def stamps(folders: Mapping[str, Path]) -> dict[str, list[Any]]:
    """What tells whether a parent's weights were touched between two runs of the same merge."""
    return {
        name: [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
        for name, folder in folders.items()
    }
