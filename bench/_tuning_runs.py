"""What tuning_help.py trains: samples of real tasks, one training in memory, and the scores of its items."""

from __future__ import annotations

import json
import lzma
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from _help import write_lines
from graft import data, models
from graft.adapters.point import Point
from graft.adapters.stack import adopt
from graft.data.examples import Encoder, LabelledCollate, labels_in
from graft.data.objective_rows import Tokens, objective_rows
from graft.data.objectives import objective_for
from graft.data.rows import ListRows, Rows
from graft.data.turns import TaskRows, Turns
from graft.disk import atomic_write
from graft.evaluate import metrics
from graft.evaluate.results import Results
from graft.evaluate.scorer import Scorer, longest_context
from graft.folders import architecture_of
from graft.hashing import shortened
from graft.lineage import hash_model
from graft.methods import method
from graft.multitask.build import add_head
from graft.train.attention import keeps_apart
from graft.train.loop import train
from graft.train.losses import TokenLoss
from graft.train.multitask import MultiTask
from graft.train.settings import TrainSettings

WORK = Path(__file__).resolve().parent / "work" / "tuning_help"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
KEPT = Path(__file__).resolve().parent / "tuning_runs"
"""Every training of the tables that stand in RESULTS.md, by the hash of the model they start from."""
HEAD_RATE = 5e-3
"""Learning rate of a fresh head, beside whatever the body's is, where none is searched for it."""

Record = dict[str, Any]
Scored = tuple[metrics.Metric, np.ndarray]
"""A metric and its statistics, `[items, k]`."""


@dataclass(frozen=True)
class Task:
    """A task on real data: `kind` of its head (`text`: the model's own), its first metric, rows in a step, steps."""

    name: str
    kind: str
    metric: str
    source: Mapping[str, Any]
    fits: Callable[[Record], bool]
    batch: int
    steps: int
    made: Callable[[Record], Record] = dict
    """A record of the sample from one of the source."""
    length: int = 128
    """Tokens of a row of text."""


@dataclass(frozen=True)
class Sample:
    """Records of a task, by split, and the labels of its head."""

    task: Task
    records: Mapping[str, list[Record]]
    labels: list[str]
    folder: Path

    def corpus(self) -> data.AnyCorpus:
        """The same as a data set, from files."""
        source = {"source": "jsonl", **{split: f"{split}.jsonl" for split in self.records}}
        return data.open_corpus({self.task.name: data.parse(source)}, self.task.name, self.folder)


def runs(name: str) -> Results:
    """What was trained under a name, here or, where nothing was, for the tables."""
    folder, kept = WORK / "runs" / name, KEPT / f"{name}.jsonl.xz"
    if kept.exists() and not (folder / "results.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "results.jsonl", lzma.decompress(kept.read_bytes()))
    return Results(folder)


def keep(results: Results) -> Path:
    """Put what was trained where it stays, compressed; returns the file."""
    path = KEPT / f"{results.folder.name}.jsonl.xz"
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, lzma.compress(results.path.read_bytes(), preset=9))
    return path


def kept(beginning: str) -> list[dict[str, Any]]:
    """What is kept of trainings whose name begins so."""
    files = sorted(KEPT.glob(f"{beginning}-*.jsonl.xz"))
    return [json.loads(line) for file in files for line in lzma.decompress(file.read_bytes()).splitlines()]


def sample(task: Task, counts: Mapping[str, int]) -> Sample:
    """So many records of each split, drawn from those that fit; all of them where there are fewer."""
    corpus = data.open_corpus({task.name: data.parse(dict(task.source))}, task.name, SHARED)
    found = {}
    folder = WORK / "data" / "-".join([task.name, *map(str, counts.values())])
    for split, count in counts.items():
        fitting = [task.made(record) for record in corpus.records(split) if task.fits(record)]
        found[split] = random.Random(0).sample(fitting, min(count, len(fitting)))
        write_lines(folder / f"{split}.jsonl", found[split])
    known = labels_in(task.kind, [*found["train"], *found["dev"]])
    return Sample(task, found, known, folder)


def points_of(name: str, options: Mapping[str, Any]) -> list[Point]:
    """The points of a named method."""
    module = method("graft.tune", name)
    return list(module.points(module.Settings(**options)))


def started(base: Path, points: Sequence[Point] | None, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) with a fresh adapter at `points`; without points frozen; None: all weights are trained."""
    torch.manual_seed(seed)
    model = models.load(base, dtype=torch.float32)
    model.requires_grad_(points is None)
    if points:
        adopt(model, points, base=base)
    return model, models.load_tokenizer(base)


def named(base: Path) -> str:
    """A model's name and the beginning of its hash: what was trained from another one of that name is not taken."""
    return f"{base.name}-{shortened(hash_model(base))}"


@dataclass(frozen=True)
class Tuned:
    """A model after its training; `head` is the task's, None for text. `trained` numbers in the body, `fresh` in it."""

    sample: Sample
    model: Any
    tokenizer: Any
    head: Any
    trained: int
    fresh: int

    def judge(self, split: str, generate: int = 0) -> dict[str, Scored]:
        """Every metric on a split; `generate`: so many answers of a text task are written out as well."""
        records = self.sample.records[split]
        if self.head is None:
            return self._text(records, generate)
        encoder = Encoder(self.tokenizer, longest_context(self.model.config), self.sample.labels)
        read = self._tags if self.sample.task.kind == "tagging" else self._classes
        metric, statistics = read(encoder, records)
        return {metric.name: (metric, statistics)}

    def _text(self, records: Sequence[Record], generate: int) -> dict[str, Scored]:
        scorer = Scorer(self.model, self.tokenizer, start=True, share=False)
        asked = [(record["source"] + "\n", record["target"]) for record in records]
        bits = [-found.log_prob / np.log(2) for found in scorer.loglikelihoods(asked)]
        sizes = [len(target.encode()) for _, target in asked]
        found: dict[str, Scored] = {"bits_per_byte": (metrics.BITS_PER_BYTE, np.array([bits, sizes]).T)}
        if generate:
            some = asked[:generate]
            written = scorer.generate([prompt for prompt, _ in some], max_tokens=40, stop=["\n"])
            for name in ("chrf", "exact_match"):
                found[name] = metrics.text_metric(name, written, [[target] for _, target in some])
        return found

    def _tags(self, encoder: Encoder, records: Sequence[Record]) -> Scored:
        examples = encoder.tagged(records)
        logits = self._read([row for row, _ in examples])
        found = []
        for each, (_, tokens) in zip(logits, examples, strict=True):
            best = each.argmax(-1)
            found.append(" ".join(self.sample.labels[int(best[t])] if t >= 0 else "?" for t in tokens))
        wanted = [[" ".join(record["tags"])] for record in records]
        return metrics.text_metric(self.sample.task.metric, found, wanted)

    def _classes(self, encoder: Encoder, records: Sequence[Record]) -> Scored:
        found = [int(each.argmax()) for each in self._read(encoder.classified(records))]
        wanted = [encoder.number[record["label"]] for record in records]
        return metrics.class_metric(self.sample.task.metric, found, wanted, len(self.sample.labels))

    @torch.inference_mode()
    def _read(self, rows: Sequence[Any]) -> list[np.ndarray]:
        """The head's logits of each row."""
        collate = LabelledCollate(self.sample.task.kind, Tokens.of(self.tokenizer).pad)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            batch = collate([rows[place] for place in places])
            logits = self.head.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            found.update(zip(places, logits.numpy(), strict=True))
        return [found[place] for place in range(len(rows))]


def tuned(
    model: Any,
    tokenizer: Any,
    given: Sample,
    *,
    rate: float,
    seed: int,
    steps: int,
    head_rate: float | None = HEAD_RATE,
) -> Tuned:
    """Train what is not frozen in `model`, in place, and a fresh head where the task has one.

    `head_rate` None: the head learns as fast as the rest.
    """
    settings = TrainSettings.model_validate(
        {
            "budget": f"{max(steps, 1)} steps",
            "batch_size": given.task.batch,
            "learning_rate": rate,
            "evaluate_every": max(steps, 1),
        }
    )
    if given.task.kind == "text":
        trained = _count(model)
        if steps:
            _train(model, _text_rows(model, tokenizer, given, seed), TokenLoss(), settings, seed)
        return Tuned(given, model, tokenizer, None, trained, 0)
    torch.manual_seed(seed)
    before = {id(parameter) for parameter in model.parameters()}
    head = add_head(model, given.task.kind, given.labels, tokenizer)
    fresh = [parameter for parameter in head.parameters() if id(parameter) not in before]
    for parameter in fresh:
        parameter.rate = 1.0 if head_rate is None else head_rate / rate
    multi = MultiTask(model, {given.task.name: head}, {given.task.name: given.task.kind})
    count = sum(parameter.numel() for parameter in fresh)
    done = Tuned(given, model, tokenizer, head, _count(multi) - count, count)
    encoder = Encoder(tokenizer, longest_context(model.config), given.labels)
    rows = encoder.rows(given.task.kind, given.records["train"])
    listed = ListRows(rows, LabelledCollate(given.task.kind, Tokens.of(tokenizer).pad), seed)
    _train(multi, TaskRows({given.task.name: listed}, Turns([(1, [1.0])])), multi.loss, settings, seed)
    return done


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _text_rows(model: Any, tokenizer: Any, given: Sample, seed: int) -> Rows:
    objective, length = objective_for(architecture_of(model.config.to_dict()), None), given.task.length
    return objective_rows(
        given.corpus(), "train", tokenizer, objective, length=length, seed=seed, cache=WORK / "cache",
        together=keeps_apart(model, length),
    )  # fmt: skip


def _train(model: nn.Module, rows: Rows, loss: Any, settings: TrainSettings, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        out, scratch = Path(folder) / "out", Path(folder) / "scratch"
        out.mkdir()
        train(model, rows, loss, settings, out, scratch=scratch, seed=seed)
