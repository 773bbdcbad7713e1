"""From a measure and a model to per-item statistics: what was measured on which item, and what came out."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graft import data
from graft.data.corpus import drawn, identity_of, text_of
from graft.data.render import prompt_and_answer
from graft.errors import RequestError
from graft.evaluate import metrics
from graft.evaluate.scorer import Scorer
from graft.evaluate.settings import (
    DRAWN,
    BitsPerByte,
    Classification,
    Generation,
    Measure,
    OnData,
    Perplexity,
    Spans,
    Tagging,
    TaskMeasure,
    misfit,
)
from graft.evaluate.tasks import Task, TaskSettings, data_of, load_task, make_task, shots


@dataclass(frozen=True)
class Subject:
    """One thing to measure: a measure on one data set and split, with its items read."""

    measure: Measure
    name: str
    task: Task | None
    on: str
    version: int
    records: list[dict[str, Any]]
    importance: np.ndarray
    """How much each item counts, [items]; all ones apart from mixtures."""
    examples: list[dict[str, Any]]
    fingerprint: str

    @property
    def drawn(self) -> list[int]:
        """Which way of drawing chose the items, where not all are taken: part of what identifies a result."""
        return [] if self.measure.limit is None else [DRAWN]

    @property
    def ids(self) -> list[str]:
        """What each item is called: a hash of its content."""
        return [f"{identity_of(record):016x}" for record in self.records]


@dataclass(frozen=True)
class Scored:
    """A metric with its statistics `[items, k]` and what stands beside each item in the file of items."""

    metric: metrics.Metric
    statistics: np.ndarray
    notes: list[dict[str, Any]]


def subjects(measure: Measure, sets: Mapping[str, Any], root: Path) -> list[Subject]:
    """A measure on each of its data sets. Raises DataError for one that is empty or of the wrong format."""
    return [read() for read in readings(measure, sets, root).values()]


def readings(measure: Measure, sets: Mapping[str, Any], root: Path) -> dict[str, Callable[[], Subject]]:
    """What reads a measure's data sets, one by one, by what is measured on which; each raises as `subjects` does."""
    if isinstance(measure, TaskMeasure):
        return {f"task {measure.task}": lambda: _of_task(measure, sets, root)}
    assert isinstance(measure, OnData)
    kind = str(measure.measure)  # type: ignore[attr-defined]
    return {f"{kind} on {ref}": functools.partial(_on_data, measure, ref, sets, root) for ref in measure.on}


def _on_data(measure: OnData, reference: str, sets: Mapping[str, Any], root: Path) -> Subject:
    name, split = data.split_ref(reference)
    corpus = data.open_corpus(sets, name, root)
    records, parts = [], []
    for part, share in corpus.parts:
        found = drawn(part.records(split), measure.limit)
        records += found
        parts.append((found, share))
    if wrong := misfit(measure, corpus.format):
        raise RequestError(wrong)
    task = None
    if isinstance(measure, Classification):
        task = _classification(measure, reference, records)
    elif isinstance(measure, Generation | Tagging | Spans):
        task = _generation(measure, reference)
    kind = str(measure.measure)  # type: ignore[attr-defined]
    return Subject(measure, kind, task, reference, 1, records, _importance(parts), [], corpus.fingerprint)


def _importance(parts: Sequence[tuple[list[dict[str, Any]], float]]) -> np.ndarray:
    """So that each part of a mixture counts by its share of the bytes, however much text it has; mean one."""
    if len(parts) == 1:
        return np.ones(len(parts[0][0]))
    sizes = [sum(len(text_of(r).encode("utf-8", "surrogatepass")) for r in records) for records, _ in parts]
    total = sum(sizes)
    each = [np.full(len(r), share * total / max(size, 1)) for (r, share), size in zip(parts, sizes, strict=True)]
    return np.concatenate(each)


def _classification(measure: Classification, on: str, records: Sequence[dict[str, Any]]) -> Task:
    labels = measure.labels or sorted({record["label"] for record in records})
    raw = {
        "name": on,
        "data": on,
        "prompt": measure.prompt,
        "choices": [],
        "target": "{{ label }}",
        "metrics": measure.metrics,
    }
    return make_task(TaskSettings.model_validate(raw), {"choices": lambda record: labels})


def _generation(measure: Generation | Tagging | Spans, on: str) -> Task:
    stop = measure.stop if isinstance(measure, Generation) else ["\n"]
    raw = {"name": on, "data": on, "metrics": measure.metrics, "max_tokens": measure.max_tokens, "stop": stop}
    targets = (lambda r: r["answer"]) if isinstance(measure, Spans) else (lambda r: [prompt_and_answer(dict(r))[1]])
    halves = {"prompt": lambda r: prompt_and_answer(dict(r))[0], "target": targets}
    return make_task(TaskSettings.model_validate(raw), halves)


def _of_task(measure: TaskMeasure, sets: Mapping[str, Any], root: Path) -> Subject:
    path = root / measure.task
    task = load_task(path)
    settings = task.settings
    corpus = data_of(settings, path, sets, root)
    records = drawn(corpus.records(settings.split), measure.limit)
    examples = _examples(corpus, settings)
    if len(examples) < settings.shots:
        raise RequestError(
            f"{path}: expected {settings.shots} examples in {settings.shots_from}, found {len(examples)}"
        )
    on = f"{settings.name}.{settings.split}"
    ones = np.ones(len(records))
    return Subject(measure, "task", task, on, settings.version, records, ones, examples, corpus.fingerprint)


def _examples(corpus: data.AnyCorpus, settings: TaskSettings) -> list[dict[str, Any]]:
    """The first `shots` records of their split, or as many drawn with a seed."""
    if not settings.shots:
        return []
    if settings.shots_seed is None:
        return list(itertools.islice(corpus.records(settings.shots_from), settings.shots))
    found = list(corpus.records(settings.shots_from))
    return random.Random(settings.shots_seed).sample(found, min(settings.shots, len(found)))


def score(subject: Subject, scorer: Scorer) -> list[Scored]:
    """Every metric of the subject for one model, items in the order of `subject.records`."""
    if isinstance(subject.measure, BitsPerByte | Perplexity):
        return [_documents(subject, scorer)]
    assert subject.task is not None
    before = shots(subject.task, subject.examples)
    if subject.task.choices is not None:
        return _choose(subject, subject.task, before, scorer)
    return _write(subject, subject.task, before, scorer)


def _documents(subject: Subject, scorer: Scorer) -> Scored:
    found = scorer.documents([text_of(record) for record in subject.records])
    notes = [{"nats": -float(d.log_probs.sum()), "tokens": len(d.log_probs), "bytes": d.bytes} for d in found]
    if isinstance(subject.measure, BitsPerByte):
        sums = np.array([[d.bits, d.bytes] for d in found])
        return Scored(metrics.BITS_PER_BYTE, sums * subject.importance[:, None], notes)
    sums = np.array([[-d.log_probs.sum(), len(d.log_probs)] for d in found])
    return Scored(metrics.PERPLEXITY, sums * subject.importance[:, None], notes)


def _choose(subject: Subject, task: Task, before: str, scorer: Scorer) -> list[Scored]:
    """Each choice is scored after the prompt; raw, per byte of the choice and per token.

    The space in front of a choice is scored and not counted, as in lm-eval's acc_bytes, where it stands between prompt
    and choice (acc_norm there counts characters).
    """
    assert task.choices is not None
    options = [task.choices(record) for record in subject.records]
    requests = [(before + task.prompt(r), o) for r, own in zip(subject.records, options, strict=True) for o in own]
    answers = iter(scorer.loglikelihoods(requests, start=_start(subject)))
    truths = [task.right(record) for record in subject.records]
    guesses: dict[str, list[int]] = {"raw": [], "byte": [], "token": []}
    notes = []
    for own, truth in zip(options, truths, strict=True):
        found = [next(answers) for _ in own]
        raw = np.array([a.log_prob for a in found])
        by = {
            "raw": raw,
            "byte": raw / [max(len(o.lstrip().encode()), 1) for o in own],
            "token": raw / [a.tokens for a in found],
        }
        for name, values in by.items():
            guesses[name].append(int(np.argmax(values)))
        notes.append({"log_probs": raw.tolist(), "right": truth, "chosen": guesses["raw"][-1]})
    classes = max(len(own) for own in options)
    made = []
    for name in task.metrics:
        kind = {"accuracy_per_byte": "byte", "accuracy_per_token": "token"}.get(name, "raw")
        plain = "accuracy" if name.startswith("accuracy") else name
        _, sums = metrics.class_metric(plain, guesses[kind], truths, classes)
        made.append(Scored(metrics.metric_of(name, sums.shape[1]), sums, notes))
    return made


def _write(subject: Subject, task: Task, before: str, scorer: Scorer) -> list[Scored]:
    prompts = [before + task.prompt(record) for record in subject.records]
    written = scorer.generate(
        prompts, max_tokens=task.settings.max_tokens, stop=task.settings.stop, start=_start(subject)
    )
    return scored_texts(subject, task, written)


def scored_texts(subject: Subject, task: Task, written: Sequence[str]) -> list[Scored]:
    """The task's metrics of what was written (or found by a head) for each item."""
    targets = [task.target(record) for record in subject.records]
    notes = [{"written": w, "targets": t} for w, t in zip(written, targets, strict=True)]
    found = (metrics.text_metric(name, written, targets) for name in task.metrics)
    return [Scored(metric, sums, notes) for metric, sums in found]


def _start(subject: Subject) -> bool | None:
    """A data set's records begin with the start token, as they do in training; a task's as the tokenizer has it."""
    return True if isinstance(subject.measure, OnData) else None
