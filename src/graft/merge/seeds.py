"""How much of a merge hangs on chance: merges with other seeds, how far they lie apart, and what they are worth."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from graft.checkpoint import FLOATS, TensorReader, TensorWriter
from graft.merge._gram import cosines, gram, lengths
from graft.merge.candidates import Candidates
from graft.merge.engine import stamps, stream
from graft.merge.journal import Journal
from graft.merge.judged import Seeds
from graft.merge.preflight import Layout
from graft.merge.settings import MergeSettings
from graft.merge.space import altered
from graft.merge.stream import Source, Tensors, Workers
from graft.verb import Job


def numbers(job: Job, asked: Seeds) -> list[int]:
    """The seeds: the job's own and those that follow it."""
    return [job.seed + step for step in range(asked.count)]


def spread(
    job: Job,
    asked: Seeds,
    settings: MergeSettings,
    plan: Layout,
    readers: Mapping[str, TensorReader],
    survey: Any,
    workers: Workers,
) -> dict[str, Any]:
    """For the manifest: norms of the merges' own deltas, and distances and cosines between them.

    `job.out` holds the merge with the job's seed. The others are written into the scratch folder, compared in one pass,
    and removed.
    """
    seeds = numbers(job, asked)
    places = [job.out, *(job.scratch / "seeds" / str(seed) for seed in seeds[1:])]
    for seed, place in zip(seeds[1:], places[1:], strict=True):
        place.mkdir(parents=True, exist_ok=True)
        what = {"settings": settings.plain(), "seed": seed, "parents": stamps(job.models)}
        journal = Journal(place / "finished", what, place)
        with closing(TensorWriter(place, plan.tensors, settings.shard, resume=True)) as writer:
            stream(settings, seed, plan, readers, writer, journal, workers, survey)
    with ExitStack() as opened:
        made = [opened.enter_context(TensorReader(place)) for place in places]
        products = _products(made, settings, plan, readers, workers)
    shutil.rmtree(job.scratch / "seeds", ignore_errors=True)
    return {"seeds": seeds, **apart(products)}


def _products(
    merges: Sequence[TensorReader],
    settings: MergeSettings,
    plan: Layout,
    readers: Mapping[str, TensorReader],
    workers: Workers,
) -> np.ndarray:
    """[merges, merges] float64: inner products of the merges' deltas (of the merges themselves without a base)."""
    total = np.zeros((len(merges), len(merges)))
    base = settings.base_name
    for name, (dtype, shape) in plan.tensors.items():
        if dtype in FLOATS and 0 not in shape:
            sources = [Source(f"merge {place}", reader, name) for place, reader in enumerate(merges)]
            below = Source(base, readers[base], plan.places[name][base]) if base is not None else None
            total += gram(Tensors(name, shape, sources, below, workers))
    return total


def apart(products: np.ndarray) -> dict[str, Any]:
    """Norms, distances and cosines from inner products [n, n]; distances are shares of the mean norm."""
    norms = lengths(products)
    first, second = np.triu_indices(len(norms), 1)
    squares = norms[first] ** 2 + norms[second] ** 2 - 2 * products[first, second]
    distances = np.sqrt(np.clip(squares, 0, None)) / max(float(norms.mean()), 1e-30)
    return {
        "norms": norms.tolist(),
        "distance": _summary(distances),
        "cosine": _summary(cosines(products)[first, second]),
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "least": float(values.min()), "most": float(values.max())}


def scores(job: Job, asked: Seeds, settings: MergeSettings, folders: Mapping[str, Path]) -> dict[str, Any]:
    """For the manifest: the metric of the merge with each seed; nothing where nothing is to be measured."""
    if not asked.judges:
        return {}
    plain = altered(settings, {})
    with Candidates(replace(job, settings=plain, models=folders), asked) as candidates:
        values = candidates.values([plain] * asked.count, numbers(job, asked))
    found = np.array([value for value in values if value is not None])
    more = {"score": _summary(found), "deviation": float(found.std(ddof=1))} if len(found) > 1 else {}
    return {"metric": candidates.judge.metric, "on": asked.data, "scores": values, **more}
