"""Several tasks in one model: its own head for text, further heads on the shared body, and the loss of a mixed batch.

Without heads the units of the loss are tokens, as with one data set. With heads a token, a sentence and a span are no
common unit, so every row counts alike: its loss is the mean over what it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from graft.adapters.foreign import tasks_of
from graft.data.alone import IGNORED
from graft.data.turns import by_task
from graft.train.attention import Batch
from graft.train.losses import TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.data.rows import Rows


class MultiTask(nn.Module):
    """`root`: the model with its own head; `heads`: models that share its body, by task. Tasks without one are text.

    `weights [tasks]` multiply the tasks' losses, in the order of `tasks`; they are a buffer, so that a resumed training
    has them.
    """

    weights: torch.Tensor
    leaves_unused = True

    def __init__(self, root: PreTrainedModel, heads: Mapping[str, PreTrainedModel], kinds: Mapping[str, str]):
        super().__init__()
        self.root, self.heads = root, nn.ModuleDict(heads)
        self.kinds = dict(kinds)
        self.tasks = list(kinds)
        self.register_buffer("weights", torch.ones(len(self.tasks)))
        self.blanks: dict[str, Batch] = {}
        """A row of each task without labels, where processes must be in step; see `keep_step`."""
        if not any(kind == "text" for kind in kinds.values()):
            self._freeze_unused()

    def _freeze_unused(self) -> None:
        """The model's own head is not trained where no task is text: it has no gradient."""
        used = {id(p) for head in self.heads.values() for p in head.parameters()}
        for name, parameter in self.root.named_parameters():
            if id(parameter) not in used and "graft_adapters" not in name:
                parameter.requires_grad_(False)

    def keep_step(self, parts: Mapping[str, Rows]) -> None:
        """Make processes that hold the model in parts, each of which all must put together, meet the same tasks.

        Whatever task one of them has rows of in a batch, the others read a row of it without labels, which has no loss.
        """
        self.blanks = {name: without_labels(part.collate([part[0]])) for name, part in parts.items()}

    def _in_step(self, own: Mapping[str, Batch]) -> dict[str, Batch]:
        """The batches of all tasks that any process has rows of, in one order; every process must ask."""
        device = self.weights.device
        there = torch.tensor([float(task in own) for task in self.tasks], device=device)
        torch.distributed.all_reduce(there)
        met = [task for task, count in zip(self.tasks, there.tolist(), strict=True) if count]
        return {t: own[t] if t in own else {n: x.to(device) for n, x in self.blanks[t].items()} for t in met}

    @property
    def loss(self) -> TaskLoss:
        """The objective of this model."""
        return TaskLoss(self.kinds)

    def forward(self, batch: Batch, weighted: bool = True) -> torch.Tensor:
        """The loss of a batch of any of the tasks, summed over its units, each task's times its weight, if wished."""
        own = self._in_step(by_task(batch)) if self.blanks else by_task(batch)
        weights = self.weights if weighted else torch.ones_like(self.weights)
        parts = [weights[self.tasks.index(task)] * self.task_loss(task, rows) for task, rows in own.items()]
        return torch.stack(parts).sum()

    def task_loss(self, task: str, batch: Batch) -> torch.Tensor:
        """The summed loss of a batch of one task, without its weight. An adapter that mixes by tasks is told which."""
        kind, told = self.kinds[task], tasks_of(self.root)
        with nullcontext() if told is None else told.using(task):
            if kind == "text":
                return TokenLoss(means=bool(len(self.heads)))(self.root, batch)
            outputs = self.heads[task](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            return HEAD_LOSSES[kind](outputs, batch["labels"])

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """As models of `transformers` have it; the body is shared, so that it holds for all heads."""
        if (told := tasks_of(self.root)) is not None:  # the layers of all tasks are computed again in one backward pass
            given = options.get("activation_checkpointing_kwargs") or {}
            options = {**options, "activation_checkpointing_kwargs": {**given, "context_fn": told.again}}
        self.root.activation_checkpointing_enable(**options)

    def activation_checkpointing_disable(self) -> None:
        """The opposite."""
        self.root.activation_checkpointing_disable()

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the models, not what chooses between them."""
        for model in (self.root, *self.heads.values()):
            model.compile(*args, **options)


def without_labels(batch: Batch) -> dict[str, torch.Tensor]:
    """The same inputs, with nothing to learn from them."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


class TaskLoss:
    """The objective: units of a batch, tokens without heads and rows with them, and the model's own loss."""

    def __init__(self, kinds: Mapping[str, str]):
        self.rows = any(kind != "text" for kind in kinds.values())

    def weight(self, batch: Batch) -> int:
        """Label tokens, or rows with a label."""
        return sum(units(own["labels"], self.rows) for own in by_task(batch).values())

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The summed loss. `model` is a MultiTask, which may be wrapped (DDP)."""
        return model(batch)


def units(labels: torch.Tensor, rows: bool) -> int:
    """How many labels there are in `labels [rows, …]`, or how many rows with one."""
    there = labels != IGNORED
    return int(there.flatten(1).any(1).sum() if rows and labels.ndim > 1 else there.sum())


def classification_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of `outputs.logits [rows, classes]`, summed over the rows that have a label in `labels [rows]`."""
    return F.cross_entropy(outputs.logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def tagging_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of `outputs.logits [rows, length, tags]`: its mean in each row of `labels`, summed over rows."""
    each = F.cross_entropy(outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return (each.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).sum()


def span_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Mean of the cross entropies of first and last token `[rows, length]` against `labels [rows, 2]`, summed over rows
    (Devlin et al. 2019, section 4.2)."""
    both = (outputs.start_logits, outputs.end_logits)
    found = [F.cross_entropy(each.float(), labels[:, side], reduction="sum") for side, each in enumerate(both)]
    return torch.stack(found).mean()


HEAD_LOSSES = {"classification": classification_loss, "tagging": tagging_loss, "spans": span_loss}
