"""What tuning on several tasks does: their rows, heads on the shared body, one training, a folder with all heads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft import data, models
from graft.data.examples import FORMATS, Encoder, LabelledCollate, labels_in
from graft.data.objectives import Tokens, objective_rows
from graft.data.rows import ListRows, Rows
from graft.data.turns import Phase, TaskRows, Turns, shares_of
from graft.errors import DataError, RequestError
from graft.multitask.build import add_head
from graft.multitask.folder import HeadFacts, heads_in, load_own, save_heads
from graft.settings import Settings
from graft.train.attention import keeps_apart
from graft.train.batches import make_step
from graft.train.loop import DEV_ROWS, Save, row_tokens, train
from graft.train.multitask import MultiTask
from graft.train.on_text import has_dev
from graft.train.place import main_first
from graft.train.settings import Budget
from graft.tune.settings import TuneSettings
from graft.tune.tasks import Mixing, Task
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def train_on_tasks(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    objective: Settings,
    length: int,
    save: Save | None,
) -> dict[str, Any]:
    """Train `model` in place on several tasks, write it (by `save`, if given) with its heads into `job.out`.

    Returns the metrics of the training and the dev loss of each task that has dev data. Raises RequestError or
    DataError for data that do not fit their heads, and for heads that do not fit their labels.
    """
    settings = job.settings
    assert isinstance(settings, TuneSettings)
    maker = Maker(job, settings, model, tokenizer, objective, length)
    with main_first():
        sources = {name: maker.source(name, task) for name, task in settings.tasks.items()}
        parts = {name: maker.rows(source, source.split) for name, source in sources.items()}
        dev_parts = {name: maker.rows(source, "dev") for name, source in sources.items() if has_dev(source.corpus)}
    earlier = heads_in(job.models[settings.from_])
    heads = {
        name: _head(model, source, tokenizer, earlier.get(name)) for name, source in sources.items() if source.kind
    }
    multi = MultiTask(model, heads, {name: task.head for name, task in settings.tasks.items()})
    rows, steps = _rows(settings, parts)
    dev = TaskRows(dev_parts, Turns([(1, [1.0] * len(dev_parts))])) if dev_parts else None
    facts = {name: sources[name].facts for name in heads}

    def write(trained: MultiTask, folder: Path) -> None:
        (save or (lambda one, place: models.save(one, tokenizer, place)))(trained.root, folder)
        if trained.heads:
            plain = dict(trained.heads.items())
            save_heads(plain, facts, tokenizer, folder, model.base_model_prefix)  # type: ignore[arg-type]

    own = settings.model_copy(update={"budget": Budget.model_validate(f"{steps} steps")})
    result = train(
        multi,
        rows,
        multi.loss,
        own,
        job.out,
        scratch=job.scratch,
        seed=job.seed,
        dev=dev,
        device=job.device,
        save=write,
    )
    write(multi, job.out)
    losses = {f"dev_loss/{name}": dev_loss(multi, name, part) for name, part in dev_parts.items()}
    return {**result.metrics, **losses, "parameters": sum(p.numel() for p in multi.parameters())}


@dataclass(frozen=True)
class TaskSource:
    """A task's data: `kind` of its head (None: text) and its labels in order."""

    name: str
    corpus: data.AnyCorpus
    split: str
    kind: str | None
    labels: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """What the configuration of its head says."""
        return {"name": self.name, "kind": self.kind, "data": self.corpus.name}


@dataclass(frozen=True)
class Maker:
    """Makes rows of tasks for one model."""

    job: Job
    settings: TuneSettings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    objective: Settings
    length: int

    def source(self, name: str, task: Task) -> TaskSource:
        """The task's data, opened. Raises RequestError for a format that its head cannot learn from."""
        where, split = data.split_ref(task.data)
        corpus = data.open_corpus(self.job.data, where, self.job.root)
        if task.head == "text":
            return TaskSource(name, corpus, split, None, [])
        if wrong := unfit(name, task, corpus.format):
            raise RequestError(wrong)
        splits = [split, *(["dev"] if has_dev(corpus) else [])]
        found = labels_in(task.head, itertools.chain.from_iterable(map(corpus.records, splits)))
        return TaskSource(name, corpus, split, task.head, _labels(name, task, found))

    def rows(self, source: TaskSource, split: str) -> Rows:
        """Rows of one split. Raises DataError where it is empty."""
        if source.kind is None:
            together = self.model.config.is_encoder_decoder or keeps_apart(self.model, self.length)
            return objective_rows(
                source.corpus, split, self.tokenizer, self.objective, length=self.length, seed=self.job.seed,
                cache=self.job.cache, together=together,
            )  # fmt: skip
        encoder = Encoder(self.tokenizer, self.length, source.labels)
        made = encoder.rows(source.kind, list(source.corpus.records(split)))
        return ListRows(made, LabelledCollate(source.kind, Tokens.of(self.tokenizer).pad), self.job.seed)


def unfit(name: str, task: Task, format: str) -> str | None:
    """Why a task's head cannot learn from data of this format; None where it can."""
    wanted = FORMATS.get(task.head)
    if wanted in (None, format):
        return None
    return (
        f"task {name}: a head for {task.head} learns from {wanted} data, and {task.data} is {format}: use `head: text`"
    )


def _labels(name: str, task: Task, found: list[str]) -> list[str]:
    """The labels of the head. Raises DataError where data have others, or only one."""
    unknown = [label for label in found if task.labels is not None and label not in task.labels]
    if unknown:
        raise DataError(f"task {name}: expected labels among {', '.join(task.labels or ())}, found {unknown[0]!r}")
    if task.head != "spans" and len(found) < 2:
        raise DataError(f"task {name}: expected two labels or more, found {', '.join(found) or 'none'}")
    return task.labels or found


def _head(
    model: PreTrainedModel, source: TaskSource, tokenizer: PreTrainedTokenizerFast, earlier: HeadFacts | None
) -> PreTrainedModel:
    """A fresh head, or the one that the model had for a task of this name.

    Raises RequestError where that one has other labels.
    """
    assert source.kind is not None
    made = add_head(model, source.kind, source.labels, tokenizer)
    if earlier is None or earlier.kind != source.kind:
        return made
    if list(earlier.labels) != source.labels:
        raise RequestError(
            f"task {source.name}: the model has a head of this name for the labels {', '.join(earlier.labels)}, the "
            f"data have {', '.join(source.labels)}: give the task another name, or say its `labels`"
        )
    load_own(made, earlier.folder)
    return made


def _rows(settings: TuneSettings, parts: Mapping[str, Rows]) -> tuple[TaskRows, int]:
    """The rows of all tasks as `mixing` wants them, and the steps of the training."""
    mixing, size = settings.mixing, settings.batch_size
    run = size if mixing.batches == "in_turn" else 1
    shares = shares_of(
        [len(part) for part in parts.values()], [task.weight for task in settings.tasks.values()],
        by_size=mixing.by == "size", temperature=mixing.temperature,
    )  # fmt: skip
    together = TaskRows(parts, Turns([(1, shares)]), run)
    steps = settings.budget.steps(len(together), size, row_tokens(together))
    return TaskRows(parts, Turns(phases(mixing, list(parts), shares, steps * size // run)), run), steps


def phases(mixing: Mixing, names: list[str], shares: list[float], turns: int) -> list[Phase]:
    """The phases of `turns` turns in all. `sequence`: each task for its share; `cumulative`: stages of one length."""
    if mixing.order == "together":
        wanted = [(1.0, shares)]
    elif mixing.order == "sequence":
        wanted = [(share, [float(k == task) for k in range(len(names))]) for task, share in enumerate(shares)]
    elif mixing.order == "cumulative":
        wanted = [(1.0, [s * (k <= last) for k, s in enumerate(shares)]) for last in range(len(names))]
    else:
        wanted = [(phase.share, [phase.tasks.get(name, 0.0) for name in names]) for phase in mixing.order]
    total, done = sum(share for share, _ in wanted), 0.0
    found: list[Phase] = []
    for share, own in wanted:
        found.append((round(turns * (done + share) / total) - round(turns * done / total), own))
        done += share
    return found


@torch.no_grad()
def dev_loss(multi: MultiTask, task: str, part: Rows, rows: int = 16) -> float:
    """The loss a unit on the first rows of a task's dev split."""
    total = units = 0.0
    device = next(multi.parameters()).device
    all_rows = TaskRows({task: part}, Turns([(1, [1.0])]))
    for start in range(0, min(len(part), 4 * DEV_ROWS), rows):
        step = make_step(all_rows, [range(start, min(start + rows, len(part)))], multi.loss)
        batch = {name.partition("/")[2]: tensor.to(device) for name, tensor in step.pieces[0].items()}
        total += float(multi.task_loss(task, batch))
        units += step.weight
    return total / max(units, 1)
