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


def problems(tasks: dict[str, Task], mixing: Mixing) -> list[str]:
    """What is wrong with names in them, a sentence each."""
    found = [
        f"expected a task's name of letters, digits, - and _, found {name!r}"
        for name in tasks
        if not NAME.fullmatch(name)
    ]
    phases = mixing.order if isinstance(mixing.order, list) else []
    named = [(name, "mixing.order") for phase in phases for name in phase.tasks]
    found += [
        f"{place}: unknown task {name!r}; there are: {', '.join(tasks)}" for name, place in named if name not in tasks
    ]
    idle = [name for name in tasks if phases and not any(name in phase.tasks for phase in phases)]
    return found + [f"mixing.order: expected every task in some phase, found {name} in none" for name in idle]
