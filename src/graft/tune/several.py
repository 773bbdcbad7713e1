"""What tuning on several tasks does: their rows, heads on the shared body, one training, a folder with all heads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft import data, models
from graft.adapters.folder import base_of
from graft.checkpoint import ADAPTER
from graft.data.examples import Encoder, LabelledCollate, labels_in
from graft.data.objective_rows import Tokens, objective_rows
from graft.data.objectives import Prefix
from graft.data.rows import ListRows, Rows
from graft.data.turns import Phase, TaskRows, Turns, shares_of
from graft.errors import DataError, RequestError
from graft.multitask.adapted import save_adapted_heads
from graft.multitask.build import add_head
from graft.multitask.folder import HeadFacts, heads_in, load_own, save_heads
from graft.prefix_lm import mark
from graft.settings import Settings
from graft.train.batches import make_step
from graft.train.learned import LearnedWeights
from graft.train.loop import DEV_ROWS, Save, row_tokens, train
from graft.train.meta import EpisodeRows, MetaLoss
from graft.train.multitask import MultiTask
from graft.train.on_text import counted, reads_together
from graft.train.place import main_first, processes, tell
from graft.train.settings import Budget, no_dev, strange
from graft.train.trackers import Title
from graft.tune.settings import TuneSettings
from graft.tune.tasks import Mixing, Task, unfit
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
    tell(job, f"{counted(model)}; reading {', '.join(settings.tasks)}")
    with main_first():
        sources = {name: maker.source(name, task) for name, task in settings.tasks.items()}
        _check_ends(settings, sources)
        parts = {name: maker.rows(source, source.split) for name, source in sources.items()}
        dev = {name: maker.rows(source, "dev") for name, source in sources.items() if data.has_dev(source.corpus)}
    if any(source.kind is None for source in sources.values()):
        mark(model, isinstance(objective, Prefix))
    earlier = heads_in(job.models[settings.from_])
    headed = {name: source for name, source in sources.items() if source.kind}
    heads = {name: _head(model, source, tokenizer, earlier.get(name)) for name, source in headed.items()}
    multi = MultiTask(model, heads, {name: task.head for name, task in settings.tasks.items()})
    # episodes are in step by themselves
    if settings.parallel is not None and settings.parallel.method != "ddp" and settings.mixing.meta is None:
        multi.keep_step(parts)
    facts = {name: source.facts for name, source in headed.items()}

    def write(trained: MultiTask, folder: Path) -> None:
        (save or (lambda one, place: models.save(one, tokenizer, place)))(trained.root, folder)
        if heads and processes()[0] == 0:
            _write_heads(heads, facts, tokenizer, folder, model)

    metrics = _train(job, settings, multi, parts, dev, write)
    write(multi, job.out)
    return {**metrics, "parameters": sum(p.numel() for p in multi.parameters())}


def _write_heads(
    heads: Mapping[str, PreTrainedModel], facts: Mapping[str, dict[str, Any]], tokenizer: PreTrainedTokenizerFast,
    folder: Path, model: PreTrainedModel,
) -> None:  # fmt: skip
    """Into the folder where the model stands already: beside its weights, or beside adapters that lie apart."""
    if not (folder / ADAPTER).is_file():
        save_heads(heads, facts, tokenizer, folder, model.base_model_prefix)
        return
    base = base_of(model)
    assert base is not None
    save_adapted_heads(heads, facts, tokenizer, folder, base)


def _check_ends(settings: TuneSettings, sources: Mapping[str, TaskSource]) -> None:
    """Raises RequestError for a task without dev data towards which weights are to be learned."""
    learn = settings.mixing.learn
    for name in (learn.for_ or settings.tasks) if learn else ():
        if not data.has_dev(sources[name].corpus):
            raise RequestError(no_dev(name))


def _train(
    job: Job, settings: TuneSettings, multi: MultiTask, parts: Mapping[str, Rows], dev: Mapping[str, Rows], write: Save
) -> dict[str, Any]:
    """The training itself, and what came out of it for each task."""
    learn, meta = settings.mixing.learn, settings.mixing.meta
    weights = None
    if learn is not None:
        ends = learn.for_ or list(parts)
        weights = LearnedWeights(multi, parts, dev, ends, every=learn.every, rate=learn.rate, rows=learn.rows)
    rows, steps = _rows(settings, parts)
    measured = {name: dev[name] for name in (weights.ends if weights else dev)}
    result = train(
        multi,
        rows,
        MetaLoss(meta.how, multi.loss, meta.rate) if meta else multi.loss,
        settings.model_copy(update={"budget": Budget.model_validate(f"{steps} steps")}),
        job.out,
        scratch=job.scratch,
        seed=job.seed,
        dev=_in_turns(settings, measured, Turns([(1, [1.0] * len(measured))])) if measured else None,
        device=job.device,
        save=write,
        before_step=weights,
        title=Title.of(job),
    )
    losses = {f"dev_loss/{name}": dev_loss(multi, name, part) for name, part in dev.items()}
    learned = zip(multi.tasks, multi.weights.tolist(), strict=True) if weights else ()
    return {**result.metrics, **losses, **{f"weight/{name}": weight for name, weight in learned}}


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
        splits = [split, *(["dev"] if data.has_dev(corpus) else [])]
        found = labels_in(task.head, itertools.chain.from_iterable(map(corpus.records, splits)))
        return TaskSource(name, corpus, split, task.head, _labels(name, task, found))

    def rows(self, source: TaskSource, split: str) -> Rows:
        """Rows of one split. Raises DataError where it is empty."""
        if source.kind is None:
            together = reads_together(self.model, self.objective, self.length)
            return objective_rows(
                source.corpus, split, self.tokenizer, self.objective, length=self.length, seed=self.job.seed,
                cache=self.job.cache, together=together,
            )  # fmt: skip
        encoder = Encoder(self.tokenizer, self.length, source.labels)
        made = encoder.rows(source.kind, list(source.corpus.records(split)))
        return ListRows(made, LabelledCollate(source.kind, Tokens.of(self.tokenizer).pad), self.job.seed)


def _labels(name: str, task: Task, found: list[str]) -> list[str]:
    """The labels of the head. Raises DataError where data have others, or only one."""
    if task.labels is not None and (wrong := strange(name, task.labels, found)):
        raise DataError(wrong)
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


def _rows(settings: TuneSettings, parts: Mapping[str, Rows]) -> tuple[Rows, int]:
    """The rows of all tasks as `mixing` wants them, and the steps of the training."""
    mixing, size = settings.mixing, settings.batch_size
    run = size if mixing.batches == "in_turn" else 1
    shares = shares_of(
        [len(part) for part in parts.values()], [task.weight for task in settings.tasks.values()],
        by_size=mixing.by == "size", temperature=mixing.temperature,
    )  # fmt: skip
    together = _in_turns(settings, parts, Turns([(1, shares)]), run)
    steps = settings.budget.steps(len(together), size, row_tokens(together))
    turns = Turns(phases(mixing, list(parts), shares, steps * size // run))
    return _in_turns(settings, parts, turns, run), steps


def _in_turns(settings: TuneSettings, parts: Mapping[str, Rows], turns: Turns, run: int = 1) -> Rows:
    """Rows, or episodes where meta-learning is wanted."""
    meta = settings.mixing.meta
    if meta is None:
        return TaskRows(parts, turns, run)
    return EpisodeRows(parts, turns, meta.steps + (meta.how == "fomaml"), meta.rows)


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
