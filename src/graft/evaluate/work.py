"""Measuring a family: every measure of every model, then every pair of models on the same items."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from graft import lineage, models
from graft.errors import Failure, RequestError, RunError, ScoresFailed, attempt
from graft.evaluate import metrics, statistics
from graft.evaluate.headed import HeadScorer
from graft.evaluate.items import Scored, Subject, readings, score
from graft.evaluate.results import VERSION, Results, Row, key_of
from graft.evaluate.scorer import Scorer
from graft.evaluate.settings import Measure
from graft.folders import folders_behind
from graft.hashing import hash_file
from graft.progress import say
from graft.vocabulary import tokenizer_of

COMPARED = 3
"""Counted up when the same scores are compared otherwise."""


def evaluate(
    folders: Mapping[str, Path],
    measures: Sequence[Measure],
    *,
    data: Mapping[str, Any],
    root: Path,
    out: Path,
    seed: int,
    device: str | None,
) -> list[Row]:
    """See `graft.evaluate.evaluate`."""
    there = [folder for folder in folders.values() if (folder / "config.json").is_file()]
    mute = [str(folder) for folder in there if tokenizer_of(folder) == frozenset()]
    if mute:
        raise RequestError(f"expected models with a tokenizer, found none in {', '.join(mute)}: put its files there")
    results = Results(out)
    asked, failures = _asked(measures, data, root)
    if not asked:
        raise ScoresFailed(failures, [])
    failures = {words: replace(failure, exit_code=RunError.exit_code) for words, failure in failures.items()}
    hashes = {name: lineage.hash_model(folder) for name, folder in folders.items()}
    told = {name: _beside_the_hash(folder) for name, folder in folders.items()}
    rows: list[Row] = []
    scored: dict[tuple[str, int], list[Row]] = {}
    for name, folder in folders.items():
        readers = _Readers(folder, device)
        for number, subject in enumerate(asked):
            if name not in (subject.measure.models or folders):
                continue
            key = _key(name, hashes[name], subject, seed, told[name])
            found = attempt(
                lambda: (
                    _known(results, key, subject)  # noqa: B023
                    or _measure(results, key, name, folder, hashes[name], subject, readers.of(subject), seed)  # noqa: B023
                )
            )
            if isinstance(found, Failure):
                failures[_told(name, subject, failures)] = replace(found, exit_code=RunError.exit_code)
                continue
            scored[name, number] = found
            rows += found
    for number in range(len(asked)):
        rows += _compared(results, [scored[n, number] for n in folders if (n, number) in scored], seed)
    if failures:
        raise ScoresFailed(failures, rows)
    return rows


def _asked(
    measures: Sequence[Measure], sets: Mapping[str, Any], root: Path
) -> tuple[list[Subject], dict[str, Failure]]:
    """What is measured, and what cannot be read, told at once: it keeps nothing else from being measured."""
    asked, failures = list[Subject](), dict[str, Failure]()
    for measure in measures:
        for words, read in readings(measure, sets, root).items():
            found = attempt(read)
            if isinstance(found, Failure):
                say(f"{words}: failed")
                failures[words] = found
            else:
                asked.append(found)
    return asked, failures


def _told(name: str, subject: Subject, others: Collection[str]) -> str:
    """What could not be measured, told at once, since what is left may take long; another name than `others`."""
    words = f"{subject.name} of {name} on {subject.on}"
    say(f"{words}: failed")
    return words if words not in others else f"{words} ({subject.measure.plain()})"


class _Readers:
    """What reads a model's items: its heads, or the model itself, loaded when it is asked first."""

    def __init__(self, folder: Path, device: str | None):
        self.folder, self.device = folder, device
        self.headed = HeadScorer(folder, device)
        self._scorer: Scorer | None = None

    def of(self, subject: Subject) -> Scorer | HeadScorer:
        """What answers a subject."""
        if self.headed.answers(subject):
            return self.headed
        if self._scorer is None:
            import torch

            place = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._scorer = Scorer(models.load(self.folder, device=place), models.load_tokenizer(self.folder))
        return self._scorer


def _beside_the_hash(folder: Path) -> dict[str, str]:
    """What else says which model it is: a configuration that is not, by the manifest, the one it was made with."""
    config, manifest = folder / "config.json", lineage.read_manifest(folder)
    if not config.is_file() or (manifest is not None and manifest.config in ("", hash_file(config))):
        return {}
    return {"config": hash_file(config)}


def _key(model: str, model_hash: str, subject: Subject, seed: int, told: Mapping[str, str]) -> str:
    return key_of(
        **told,
        model=model,
        hash=model_hash,
        on=subject.on,
        settings={name: value for name, value in subject.measure.plain().items() if name not in ("on", "models")},
        task=subject.task.settings.plain() if subject.task else None,
        version=[VERSION, subject.version, *subject.drawn],
        data=subject.fingerprint,
        seed=seed,
    )


def _known(results: Results, key: str, subject: Subject) -> list[Row] | None:
    """The rows of an earlier run for this key, if all are there."""
    names = subject.task.metrics if subject.task else [subject.name]
    rows = [results.get(f"{key}:{name}") for name in names]
    return [row for row in rows if row is not None] if all(row is not None for row in rows) else None


def _measure(
    results: Results,
    key: str,
    name: str,
    folder: Path,
    model_hash: str,
    subject: Subject,
    scorer: Scorer | HeadScorer,
    seed: int,
) -> list[Row]:
    """Score, write the items, then the rows."""
    before, started = scorer.tokens_read, time.perf_counter()
    with PeakMemory() as memory:
        found = scorer.score(subject) if isinstance(scorer, HeadScorer) else score(subject, scorer)
    seconds = time.perf_counter() - started
    cost = {
        "tokens_per_s": (scorer.tokens_read - before) / max(seconds, 1e-9),
        "seconds": seconds,
        "peak_memory_bytes": memory.peak,
        "disk_bytes": disk_bytes(folder),
    }
    rows = []
    for one in found:
        own = f"{key}:{one.metric.name}"
        row = _row(name, folder, model_hash, subject, one, seed, cost)
        items = results.write_items(key_of(key=own), subject.ids, one.statistics, one.notes)
        rows.append(results.append({**row, "key": own, "items": items}))
    return rows


def _row(
    name: str, folder: Path, model_hash: str, subject: Subject, scored: Scored, seed: int, cost: Mapping[str, float]
) -> Row:
    metric, sums = scored.metric, scored.statistics
    value = float(metric.value(sums.sum(0, keepdims=True))[0])
    if np.isnan(value):
        raise RunError(f"{metric.name} is not a number; check the model's weights")
    note = "" if np.isfinite(value) else "infinite: the model gives probability zero to what comes"
    low, high, interval = _interval(metric, sums, value, seed)
    return {
        "kind": "score",
        "model": name,
        "model_hash": model_hash,
        "folder": str(folder),
        "measure": subject.name,
        "task": subject.task.settings.name if subject.task else subject.name,
        "metric": metric.name,
        "on": subject.on,
        "value": _finite(value),
        "note": note,
        "low": _finite(low),
        "high": _finite(high),
        "confidence": statistics.CONFIDENCE,
        "interval": interval,
        "n": len(sums),
        "unit": metric.unit,
        "signature": metric.signature,
        "higher_is_better": metric.higher_is_better,
        "task_version": subject.version,
        "seed": seed,
        "settings": subject.measure.plain(),
        "data": subject.fingerprint,
        "cost": dict(cost),
        "versions": lineage.versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _interval(metric: metrics.Metric, sums: np.ndarray, value: float, seed: int) -> tuple[float, float, str]:
    """(low, high, what it is called) of a score."""
    if metric.proportion:
        return *statistics.wilson(float(sums[:, 0].sum()), len(sums)), "wilson"
    low, high = statistics.bootstrap(_resampled(metric, sums), len(sums), seed)
    if metric.bounds is not None and _meet(low, high):
        return *statistics.unvaried(value, len(sums), metric.bounds), "wilson, no item differs"
    return low, high, f"bootstrap, {statistics.DRAWS} draws"


def _meet(low: float, high: float) -> bool:
    """Whether an interval has no width, but for what rounding leaves."""
    return high - low < 1e-9


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _resampled(metric: metrics.Metric, sums: np.ndarray) -> statistics.Score:
    finite = np.where(np.isfinite(sums), sums, 1e300)  # what is not drawn must count nothing, and 0 · inf is not 0
    return lambda counts: metric.value(counts @ finite)


@dataclass(frozen=True)
class _Redrawn:
    """What a row is compared by: statistics `[items, k]`, its score on resampled items `[draws]` (None of one item)."""

    sums: np.ndarray
    scores: np.ndarray | None
    metric: metrics.Metric


def _compared(results: Results, by_model: Sequence[Sequence[Row]], seed: int) -> list[Row]:
    """Every pair of models, metric by metric, on the same items."""
    return [row for of_metric in zip(*by_model, strict=True) for row in _pairs(results, of_metric, seed)]


def _pairs(results: Results, of_metric: Sequence[Row], seed: int) -> list[Row]:
    redrawn: dict[str, _Redrawn] | None = None
    rows = []
    for a, b in itertools.combinations(of_metric, 2):
        key = key_of(first=a["key"], second=b["key"], kind="comparison", version=COMPARED)
        row = results.get(key)
        if row is None:
            redrawn = _redrawn(results, of_metric, seed) if redrawn is None else redrawn
            if a["key"] in redrawn and b["key"] in redrawn:
                row = _compare(results, a, b, redrawn[a["key"]], redrawn[b["key"]], key)
        rows += [row] if row else []
    return rows


def _redrawn(results: Results, rows: Sequence[Row], seed: int) -> dict[str, _Redrawn]:
    """Rows that have a value and the same items, resampled alike, by their keys."""
    read = {row["key"]: results.read_items(row) for row in rows if row["value"] is not None}
    whole = {key: items for key, items in read.items() if items is not None}
    if not whole:
        return {}
    ids = next(iter(whole.values()))[0]
    same = {key: sums for key, (own, sums) in whole.items() if own == ids}
    metric = metrics.metric_of(rows[0]["metric"], next(iter(same.values())).shape[1])
    scores = [_resampled(metric, sums) for sums in same.values()]
    drawn = statistics.redrawn(scores, len(ids), seed) if len(ids) > 1 else [None] * len(same)
    return {key: _Redrawn(sums, drew, metric) for (key, sums), drew in zip(same.items(), drawn, strict=True)}


def _compare(results: Results, a: Row, b: Row, first: _Redrawn, second: _Redrawn, key: str) -> Row:
    low = high = p = float("nan")
    if first.scores is not None and second.scores is not None:
        low, high, p = statistics.paired(first.scores, second.scores, len(first.sums))
    if first.metric.bounds is not None and _meet(low, high) and a["model_hash"] != b["model_hash"]:
        most = first.metric.bounds[1] - first.metric.bounds[0]
        low, high = statistics.unvaried(a["value"] - b["value"], len(first.sums), (-most, most))
    test = "paired bootstrap"
    if first.metric.proportion:
        test, p = "McNemar, exact", statistics.mcnemar(first.sums[:, 0] > 0.5, second.sums[:, 0] > 0.5)
    return results.append(
        {
            "kind": "comparison",
            "key": key,
            "models": [a["model"], b["model"]],
            "model_hashes": [a["model_hash"], b["model_hash"]],
            **{
                name: a[name]
                for name in ("measure", "task", "metric", "on", "n", "higher_is_better", "task_version", "seed")
            },
            "difference": a["value"] - b["value"],
            "low": _finite(low),
            "high": _finite(high),
            "p": _finite(p),
            "test": test,
            "confidence": statistics.CONFIDENCE,
        }
    )


def disk_bytes(folder: Path) -> int:
    """Bytes of the model's files; an ensemble's are those of its members, an adapter's those of its base as well.

    What several of them share is counted once; checkpoints and the log of the training are no part of the model.
    """
    files: set[Path] = set()
    for place in folders_behind(folder):
        files |= {f for f in place.rglob("*") if not {"checkpoints", "log.jsonl"} & {*f.relative_to(place).parts}}
    return sum(file.stat().st_size for file in files if file.is_file())


class PeakMemory:
    """The most memory this process holds while it is open, looked at twenty times a second; on a GPU as torch says."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        import psutil

        process = psutil.Process(os.getpid())
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._ended.wait(0.05):
                return

    def __enter__(self) -> PeakMemory:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        self._ended.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.peak = max(int(torch.cuda.max_memory_allocated()), 1)
