"""What `tasks:` and `mixing:` of `tune` may say. Light."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from graft.settings import DataRef, Settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Task(Settings):
    """One of several tasks: `topic: {data: topics, head: classification}`, or `prose: prose` for text."""

    data: Annotated[DataRef, Field(description="Data set of the task, with its dev split for dev scores.")]
    head: Annotated[
        Literal["text", "classification", "tagging", "spans"],
        Field(
            description="`text`: by the model's own head, whatever the format of the data. `classification` (of "
            "labelled data), `tagging` (tagged) and `spans` (spans) have heads of their own on the shared body."
        ),
    ] = "text"
    weight: Annotated[float, Field(gt=0, description="Its share of the rows is in proportion to this.")] = 1.0
    labels: Annotated[
        list[str] | None, Field(min_length=2, description="Classes or tags; None: all in the train and dev splits.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        return {"data": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _labels_for_labels(self) -> Task:
        if self.labels is not None and self.head not in ("classification", "tagging"):
            raise ValueError(f"expected labels of a classification or a tagging, found them at `head: {self.head}`")
        return self


class Learned(Settings):
    """Weights learned while training: what points where the dev data points gets more (Wang et al. 2020).

    Every so often each task's gradient is compared with the gradient on the dev data of the tasks in `for`; its weight
    rises by the cosine between them.
    """

    for_: Annotated[
        list[str], Field(alias="for", description="The tasks whose dev loss is to fall (the end tasks); empty: all.")
    ] = []
    every: Annotated[int, Field(ge=1, description="Steps between two comparisons.")] = 10
    rate: Annotated[float, Field(gt=0, description="How fast weights follow; that of the logits behind them.")] = 0.5
    rows: Annotated[int, Field(ge=1, description="Rows of each task, and of its dev data, in a comparison.")] = 8


class Meta(Settings):
    """Meta-learning: start weights from which few steps on one task lead far.

    Every row of a batch is an episode: `steps` steps of gradient descent on fresh rows of one task. `fomaml` moves
    towards what lowers the loss on further rows behind these steps (first order: Finn et al. 2017, section 5.2),
    `reptile` towards where they led (Nichol et al. 2018).
    """

    how: Annotated[Literal["fomaml", "reptile"], Field(description="Which of the two.")] = "fomaml"
    steps: Annotated[int, Field(ge=1, description="Steps on the task in an episode.")] = 3
    rows: Annotated[int, Field(ge=1, description="Rows in each of these steps, and in the loss behind them.")] = 4
    rate: Annotated[float, Field(gt=0, description="Learning rate of these steps.")] = 0.01

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        return {"how": raw} if isinstance(raw, str) else raw


class Phase(Settings):
    """A part of the training with shares of its own."""

    share: Annotated[float, Field(gt=0, description="Share of the training, beside the other phases'.")] = 1.0
    tasks: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        Field(min_length=1, description="Tasks in it, with weights if wanted."),
    ]

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, raw: Any) -> Any:
        tasks = raw.get("tasks") if isinstance(raw, dict) else None
        return {**raw, "tasks": dict.fromkeys(tasks, 1.0)} if isinstance(tasks, list) else raw


class Mixing(Settings):
    """How several tasks share a training."""

    batches: Annotated[
        Literal["mixed", "in_turn"],
        Field(description="`mixed`: rows of all tasks in every batch; `in_turn`: each batch is of one task."),
    ] = "mixed"
    order: Annotated[
        Literal["together", "sequence", "cumulative"] | list[Phase],
        Field(
            description="`together`: all at once. `sequence`: one after the other as they stand there (pretrain, then "
            "tune). `cumulative`: the next one joins at each stage (questions before documents). Or phases with their "
            "shares and tasks."
        ),
    ] = "together"
    by: Annotated[
        Literal["weight", "size"], Field(description="Shares by the tasks' `weight`, or by that times their rows.")
    ] = "weight"
    temperature: Annotated[float, Field(gt=0, description="1 keeps the shares; higher evens them out.")] = 1.0
    learn: Annotated[Learned | None, Field(description="Weights of the tasks' losses, learned beside.")] = None
    meta: Annotated[Meta | None, Field(description="Learn to be tuned rather than the tasks themselves.")] = None

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Mixing:
        if self.learn is not None and self.meta is not None:
            raise ValueError("expected `learn` or `meta`, found both: weights are learned for tasks, not for episodes")
        if self.meta is not None and self.batches == "in_turn":
            raise ValueError("expected `batches: mixed` with `meta`, found in_turn: an episode is of one task anyway")
        return self


FORMATS = {"classification": "labelled", "tagging": "tagged", "spans": "spans"}
"""The format of data that each kind of head learns from."""


def unfit(name: str, task: Task, format: str | None) -> str | None:
    """Why a task's head cannot learn from data of this format; None where it can, or where the format is not known."""
    wanted = FORMATS.get(task.head)
    if format is None or wanted in (None, format):
        return None
    return (
        f"task {name}: a head for {task.head} learns from {wanted} data, and {task.data} is {format}: use `head: text`"
    )


def problems(tasks: dict[str, Task], mixing: Mixing) -> list[str]:
    """What is wrong with names in them, a sentence each."""
    found = [
        f"expected a task's name of letters, digits, - and _, found {name!r}"
        for name in tasks
        if not NAME.fullmatch(name)
    ]
    phases = mixing.order if isinstance(mixing.order, list) else []
    named = [(name, "mixing.learn.for") for name in (mixing.learn.for_ if mixing.learn else ())]
    named += [(name, "mixing.order") for phase in phases for name in phase.tasks]
    found += [
        f"{place}: unknown task {name!r}; there are: {', '.join(tasks)}" for name, place in named if name not in tasks
    ]
    idle = [name for name in tasks if phases and not any(name in phase.tasks for phase in phases)]
    return found + [f"mixing.order: expected every task in some phase, found {name} in none" for name in idle]
