"""Many tasks over one frozen model in one batch: each row with its own adapter and its own head, the body read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.adapters.facts import entry_of
from graft.adapters.folder import add_from
from graft.adapters.foreign import tasks_of
from graft.adapters.stack import adapters_of
from graft.checkpoint import read_file_headers
from graft.errors import RequestError, UnknownName
from graft.multitask.adapted import filled_head
from graft.multitask.folder import OWN, HeadFacts, heads_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ManyTasks:
    """Tasks by name, each of an adapter's folder with heads beside it, all made for one frozen model.

    A folder with peft's adapter that mixes by tasks stands alone. Raises RequestError where a folder has no heads, or
    runs several adapters for one row; CheckpointError for adapters of another frozen model; called, UnknownName for a
    task that is not there.
    """

    def __init__(self, folders: Sequence[str | Path], *, device: str | None = None):
        from graft import models

        first, *others = map(Path, folders)
        self.root: PreTrainedModel = models.load(first, device=device)
        self.stack, self.mixed = adapters_of(self.root), tasks_of(self.root)
        if self.stack is None and self.mixed is None:
            raise RequestError(f"{first}: expected adapters of graft's own points with heads, found others")
        self.adapter, self.facts = dict[str, str](), dict[str, HeadFacts]()
        self._take(first, list(self.stack.active) if self.stack else [("all", 1.0)])
        for folder in others:
            self._take(folder, add_from(self.root, folder))
        self.heads, self.poolers = dict[str, Any](), dict[str, Any]()
        for task, facts in self.facts.items():
            self.heads[task] = filled_head(self.root, facts.folder).eval()
            # it stands in the body, which has room for one
            trained = any(".pooler." in name for name in read_file_headers(facts.folder / OWN))
            self.poolers[task] = copy.deepcopy(self.root.base_model.pooler) if trained else None

    def _take(self, folder: Path, active: Sequence[tuple[str, float]]) -> None:
        """Note which adapter the tasks of a folder run with."""
        heads = heads_in(folder)
        if not heads or len(active) != 1 or active[0][1] != 1.0:
            found = f"{len(heads)} heads, adapters {', '.join(entry_of(folder)['adapters'])}"
            raise RequestError(f"{folder}: expected heads and one adapter of weight 1 for their rows, found {found}")
        if both := set(heads) & set(self.facts):
            raise RequestError(f"{folder}: expected tasks of other names, found {both.pop()} a second time")
        self.facts |= heads
        self.adapter |= dict.fromkeys(heads, active[0][0])

    def _each_row(self, tasks: Sequence[str]) -> AbstractContextManager[None]:
        """Inside, each row is read with the adapter of its task."""
        if self.stack is None:
            assert self.mixed is not None
            return self.mixed.each_row(tasks)
        return self.stack.each_row([self.adapter[task] for task in tasks])

    @torch.inference_mode()
    def __call__(
        self, tasks: Sequence[str], input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        """What the head of each row's task gives: `logits`, or `start_logits` and `end_logits`, without the batch.

        `input_ids`, `attention_mask [rows, length]`; `tasks` names one for each row.

        Raises UnknownName for a task that is not there, RequestError where there are not as many as rows.
        """
        if len(tasks) != len(input_ids):
            raise RequestError(f"expected a task for each of {len(input_ids)} rows, found {len(tasks)}")
        for task in tasks:
            if task not in self.heads:
                raise UnknownName("task", task, self.heads)
        body: Any = self.root.base_model
        with self._each_row(tasks):
            read = body(input_ids=input_ids, attention_mask=attention_mask)
        found: list[dict[str, torch.Tensor]] = [{} for _ in tasks]
        for task in dict.fromkeys(tasks):
            rows = torch.tensor([row for row, own in enumerate(tasks) if own == task], device=input_ids.device)
            head, held = self.heads[task], {name: _taken(value, rows) for name, value in read.items()}
            if (pooler := self.poolers[task]) is not None:
                held["pooler_output"] = pooler(held["last_hidden_state"])
            with _already_read(head, held, type(read)):
                given = head(input_ids=input_ids[rows], attention_mask=attention_mask[rows])
            for place, row in enumerate(rows.tolist()):
                found[row] = {name: value[place] for name, value in given.items() if name.endswith("logits")}
        return found


def _taken(value: Any, rows: torch.Tensor) -> Any:
    return value[rows] if isinstance(value, torch.Tensor) else None


class _Read(nn.Module):
    """Stands in the place of a body and gives what was read already."""

    def __init__(self, held: Mapping[str, Any], kind: Any):
        super().__init__()
        self.held, self.kind = held, kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was read, whatever is asked."""
        return self.kind(**self.held)


@contextmanager
def _already_read(head: PreTrainedModel, held: Mapping[str, Any], kind: Any) -> Iterator[None]:
    """Inside, `head` stands on what its body gave before."""
    name = head.base_model_prefix
    body = getattr(head, name)
    setattr(head, name, _Read(held, kind))
    try:
        yield
    finally:
        setattr(head, name, body)
