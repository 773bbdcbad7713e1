"""The merge engine: all parents streamed through a method's rule into one folder.

    headers and configurations (preflight) → layout of the output → each tensor in pieces, on all cores → files beside

Nothing is written before everything that headers can tell has been checked. What is held in memory are a few pieces a
core, whatever the size of the models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from graft.checkpoint import FLOATS, TensorReader, TensorWriter, atomic_write
from graft.errors import CannotCombine
from graft.merge.journal import Journal
from graft.merge.preflight import Layout, layout, verify
from graft.merge.settings import MergeSettings
from graft.merge.stream import Source, Tensors, Workers, same_bytes
from graft.methods import method
from graft.progress import Progress
from graft.verb import Job

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files beside the weights that the output takes from one parent."""
AT_ONCE = 2
"""Tensors worked on at the same time, so that no core waits for the last piece of one."""


def run(job: Job) -> dict[str, Any]:
    """Write the merged model's folder into `job.out`; returns the notes for the manifest."""
    settings = job.settings
    assert isinstance(settings, MergeSettings)
    plan = layout(settings, job.models)
    _files_beside(plan, job.models[settings.parents[0]], job.out)
    plan.notes["verified_as"] = verify(job.out, plan.tensors)
    with ExitStack() as opened:
        readers = {name: opened.enter_context(TensorReader(job.models[name])) for name in settings.parents}
        writer = TensorWriter(job.out, plan.tensors, settings.shard, resume=True)
        opened.callback(writer.close)
        what = {"settings": settings.plain(), "seed": job.seed, "parents": _stamps(job.models)}
        journal = opened.enter_context(Journal(job.scratch / "finished", what, job.out))
        workers = opened.enter_context(Workers())
        stream(settings, job.seed, plan, readers, writer, journal, workers)
    return {"notes": plan.notes, "forced": list(plan.forced)}


def stream(
    settings: MergeSettings,
    seed: int,
    plan: Layout,
    readers: Mapping[str, TensorReader],
    writer: TensorWriter,
    journal: Journal,
    workers: Workers,
) -> None:
    """Make every tensor that the journal does not know yet."""
    chosen = method("graft.merge", settings.method)
    made = [n for n in plan.tensors if n not in journal.finished]
    total = sum(writer.headers[n].end - writer.headers[n].start for n in made)

    def one(name: str) -> int:
        sources = {m: Source(m, readers[m], place) for m, place in plan.places[name].items()}
        header = writer.headers[name]
        if header.dtype in FLOATS:
            tensors = _tensors(name, header.shape, sources, settings, workers, seed, chosen)
            tensors.write(chosen.rule(tensors, settings), writer)
        else:
            _copy(name, sources, writer)
        journal.note(name, header.end - header.start)
        return header.end - header.start

    with Progress("merging", total, "B") as progress, ThreadPoolExecutor(AT_ONCE) as several:
        futures = [several.submit(one, name) for name in made]
        try:
            for future in futures:
                progress.advance(future.result())
        except BaseException:
            several.shutdown(wait=True, cancel_futures=True)
            raise


def _tensors(
    name: str,
    shape: tuple[int, ...],
    sources: Mapping[str, Source],
    settings: MergeSettings,
    workers: Workers,
    seed: int,
    chosen: ModuleType,
) -> Tensors:
    base = sources[settings.base_name] if settings.base_name is not None else None
    models = [sources[model] for model in settings.names]
    return Tensors(name, shape, models, base, workers, seed, getattr(chosen, "BY_ROWS", False))


def _copy(name: str, sources: Mapping[str, Source], writer: TensorWriter) -> None:
    """Tensors of whole numbers are buffers: they must be the same everywhere and are taken over."""
    if not same_bytes(sources):
        raise CannotCombine(f"{name} holds whole numbers that differ between {', '.join(sources)}: they have no mean")
    source = next(iter(sources.values()))
    header = source.reader.headers[source.name]
    content = bytearray(header.end - header.start)
    source.reader.read_into(source.name, 0, memoryview(content))
    writer.write(name, 0, memoryview(content))


def _files_beside(plan: Layout, parent: Path, out: Path) -> None:
    """Configuration, generation configuration, tokenizer and chat template, all of the first parent."""
    atomic_write(out / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
    found = [name for name in COMPANIONS if (parent / name).is_file()]
    for name in found:
        shutil.copyfile(parent / name, out / name)
    plan.notes["files_taken"] = found


def _stamps(folders: Mapping[str, Path]) -> dict[str, list[Any]]:
    """What tells whether a parent's weights were touched between two runs of the same merge."""
    return {
        name: [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
        for name, folder in folders.items()
    }
