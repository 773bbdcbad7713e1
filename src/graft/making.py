"""Making one node: the verb writes into `work/<node>/out`, the manifest is added, the folder is renamed to its place.

Safe at any moment: what a kill leaves in `work/<node>` is gone on from, or removed where it belongs to another key; a
folder that was finished but not yet renamed is renamed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graft import verbs
from graft.disk import atomic_write, disk_errors, replace_folder
from graft.facts import parameters_in
from graft.folders import read_config
from graft.hashing import hash_file
from graft.lineage import (
    DataUse,
    Manifest,
    Parent,
    code_state,
    hash_model,
    read_manifest,
    stamps,
    versions,
    write_manifest,
)
from graft.machine import boot
from graft.settings import Settings
from graft.verb import Facts, Job
from graft.vocabulary import vocabulary_hash


@dataclass(frozen=True)
class Work:
    """Everything needed to make one node, in this process or in another."""

    name: str
    verb: str
    settings: Settings
    seed: int
    key: str
    facts: Facts
    target: Path
    """Where the artifact will stand."""
    work: Path
    cache: Path
    models: Mapping[str, Path]
    """Folders of the parents, by name, in order."""
    data: Mapping[str, Any]
    """Settings of every data set."""
    uses: tuple[DataUse, ...]
    """Splits that this node reads."""
    root: Path
    device: str | None = None
    fresh: bool = False
    """Start over, whatever an earlier run left."""


def run_verb(work: Work) -> Manifest:
    """Do the verb's work and write the manifest beside what it made."""
    job = job_of(work)
    started = time.monotonic()
    with disk_errors(work.work):
        found = verbs.verb(work.verb).run(job)
    manifest = _manifest(work, found, time.monotonic() - started)
    write_manifest(job.out, manifest)
    return manifest


def make(work: Work, run: Callable[[Work], Manifest] = run_verb) -> Manifest:
    """Make the node and return its manifest. A second process that makes the same node waits for the first."""
    from filelock import FileLock

    with disk_errors(work.work):
        work.work.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work.work.with_name(f"{work.name}.lock"))
    with lock:
        _prepare(work)
        manifest = read_manifest(work.work / "out")
        if manifest is None:
            manifest = run(work)
        with disk_errors(work.target):
            work.target.parent.mkdir(parents=True, exist_ok=True)
            replace_folder(work.work / "out", work.target, on_disk=manifest.boot is None)
            shutil.rmtree(work.work, ignore_errors=True)
    return manifest


def _prepare(work: Work) -> None:
    """Keep what an earlier run left for the same key, and remove it where it was for another."""
    mark = work.work / "key"
    with disk_errors(work.work):
        if work.fresh or not mark.is_file() or mark.read_text() != work.key:
            shutil.rmtree(work.work, ignore_errors=True)
        for replaced in work.target.parent.glob(f".{work.target.name}.*.old"):
            shutil.rmtree(replaced)
        for folder in (work.work / "out", work.work / "scratch", work.cache):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write(mark, work.key)


def job_of(work: Work) -> Job:
    """What the verb is given."""
    return Job(
        work.name, work.settings, work.seed, work.work / "out", work.work / "scratch", work.cache, work.models,
        work.data, work.root, work.target, work.device,
    )  # fmt: skip


def _manifest(work: Work, found: Mapping[str, Any], seconds: float) -> Manifest:
    out = work.work / "out"
    return Manifest(
        name=work.name,
        verb=work.verb,
        verb_version=verbs.verb(work.verb).version,
        key=work.key,
        parents=[_parent(name, folder, work.target) for name, folder in work.models.items()],
        settings=work.settings.plain(),
        seed=work.seed,
        versions=versions(),
        code=code_state(),
        data=list(work.uses),
        files=stamps(out),
        config=hash_file(out / "config.json") if (out / "config.json").is_file() else "",
        boot=None if verbs.verb(work.verb).on_disk else boot(),
        hash=hash_model(out),
        initialisation=work.facts.initialisation,
        vocabulary=vocabulary_hash(out) if (out / "tokenizer.json").is_file() else work.facts.vocabulary,
        architecture=work.facts.architecture,
        parameters=_parameters(out) or work.facts.parameters,
        mergeable=work.facts.mergeable,
        trained_on=_trained_on(work),
        metrics={name: value for name, value in found.items() if name not in ("notes", "forced")},
        notes=found.get("notes", {}),
        forced=found.get("forced", []),
        threads=_threads(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )


def _trained_on(work: Work) -> list[str]:
    """Fingerprint and split of all data that models learned from, the ancestors of this one included."""
    own = {f"{use.fingerprint}.{use.split}" for use in work.uses if use.split == "train"}
    before = (read_manifest(folder) for folder in work.models.values())
    return sorted(own.union(*(manifest.trained_on for manifest in before if manifest is not None)))


def _threads() -> int | None:
    return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None


def _parent(name: str, folder: Path, target: Path) -> Parent:
    from graft.plan.keys import weights_hash

    beside = folder.parent == target.parent
    return Parent(
        name=name,
        path=os.path.relpath(folder, target) if beside else str(folder.absolute()),
        hash=weights_hash(folder),
    )


def _parameters(out: Path) -> int:
    from graft.checkpoint import ADAPTER, read_headers

    if not list(out.glob("*.safetensors")) or (out / ADAPTER).is_file():
        return 0
    # an adapter in the form of peft has no configuration of a model
    config = read_config(out) if (out / "config.json").is_file() else {}
    return parameters_in(read_headers(out).values(), config)
