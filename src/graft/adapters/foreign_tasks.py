"""Poly (Ponti et al. 2022, arXiv:2202.13914): peft's layers are told which task each row is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from graft.errors import CheckpointError, RequestError, UnknownName

TASKED = "POLY"
"""The type that wants a task's number with every row."""


def is_tasked(settings: Mapping[str, Any]) -> bool:
    """Whether peft's settings are of the type that mixes by tasks."""
    return str(settings.get("peft_type")).upper() == TASKED


def with_tasks(settings: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """peft's settings with `n_tasks`, where none is given. Raises RequestError where it is another number."""
    found = settings.get("n_tasks", len(tasks))
    if found != len(tasks):
        raise RequestError(
            f"expected `n_tasks: {len(tasks)}`, one for each of the tasks ({', '.join(tasks)}), found {found!r}: leave "
            "it out"
        )
    return {**settings, "n_tasks": len(tasks)}


def names_of(settings: Mapping[str, Any], tasks: Iterable[str]) -> list[str]:
    """What the tasks of an adapter with these settings are called: as those of its training, or by their numbers."""
    return list(tasks) or [str(number) for number in range(settings.get("n_tasks", 1))]


class RowTasks:
    """The tasks of a model by name, in the order of their numbers, and which of them rows are of.

    `chosen` is that of every row where nothing else is said; a saved adapter keeps it.
    """

    def __init__(self, names: Iterable[str]):
        self.names = list(names)
        self.chosen = self.names[0]
        self.rows: list[int] | None = None
        """The task's number of each row, where they are of several."""

    def call(self, names: Sequence[str]) -> None:
        """Give the tasks other names; the first is chosen. Raises RequestError for another number of them."""
        if len(names) != len(self.names):
            raise RequestError(
                f"expected {len(self.names)} tasks, as many as the adapter has, found {len(names)}: {', '.join(names)}"
            )
        self.names, self.chosen = list(names), names[0]

    def use(self, task: str) -> None:
        """All rows are of `task` from here on. Raises UnknownName for one that is not there."""
        self._number(task)
        self.chosen, self.rows = task, None

    def using(self, task: str) -> AbstractContextManager[None]:
        """Inside, all rows are of `task`. Raises UnknownName for one that is not there."""
        self._number(task)
        return _As(self, task, None)

    def each_row(self, tasks: Sequence[str]) -> AbstractContextManager[None]:
        """Inside, row i of a batch is of `tasks[i]`. Raises UnknownName for one that is not there."""
        return _As(self, self.chosen, [self._number(task) for task in tasks])

    def again(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What `torch.utils.checkpoint` takes as `context_fn`: layers are computed once more as rows are now, whatever
        others have been read since."""
        return nullcontext(), _As(self, self.chosen, self.rows)

    def _number(self, task: str) -> int:
        if task not in self.names:
            raise UnknownName("task", task, self.names)
        return self.names.index(task)

    def numbers(self, count: int) -> Any:
        """`[count] int64` of a batch of `count` rows; beams may have multiplied those that were named.

        Raises RequestError where the rows do not fit the names.
        """
        import torch

        # on the CPU: peft asks each layer for the largest of them
        if self.rows is None:
            return torch.full((count,), self._number(self.chosen))
        if not self.rows or count % len(self.rows):
            raise RequestError(f"expected a batch of {len(self.rows)} rows, one for each task named, found {count}")
        return torch.tensor(self.rows).repeat_interleave(count // len(self.rows))

    def tell(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook before each of peft's layers: its input `[rows, length, width]` comes with the rows' tasks, unless
        who calls peft's own wrapper says them."""
        return args, kwargs if "task_ids" in kwargs else {**kwargs, "task_ids": self.numbers(len(args[0]))}

    def said(self) -> dict[str, Any]:
        """What `config.json` is to say of them."""
        return {"names": self.names, "chosen": self.chosen}

    def take(self, said: Any, place: object) -> None:
        """Read what `said` gave. Raises CheckpointError, naming `place`, where it does not fit the adapter."""
        names = said.get("names") if isinstance(said, dict) else None
        named = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
        if not len(named) == len(set(named)) == len(self.names) or said.get("chosen") not in named:
            raise CheckpointError(
                f"{place}: expected the names of {len(self.names)} tasks and the chosen one of them, found {said!r}"
            )
        self.call(named)
        self.use(said["chosen"])


class _As(AbstractContextManager[None]):
    """Inside, rows are of these tasks; it may be entered again."""

    def __init__(self, tasks: RowTasks, chosen: str, rows: list[int] | None):
        self.tasks, self.inside = tasks, (chosen, rows)
        self.before: list[tuple[str, list[int] | None]] = []

    def __enter__(self) -> None:
        self.before.append((self.tasks.chosen, self.tasks.rows))
        self.tasks.chosen, self.tasks.rows = self.inside

    def __exit__(self, *_: object) -> None:
        self.tasks.chosen, self.tasks.rows = self.before.pop()


def tell_tasks(wrapper: Any) -> RowTasks:
    """Let peft's layers below `wrapper` be told; of the first task, as long as nothing else is said."""
    from peft.tuners.poly.layer import PolyLayer

    tasks = RowTasks(names_of({"n_tasks": wrapper.peft_config[wrapper.active_adapter].n_tasks}, ()))
    for module in wrapper.modules():
        if isinstance(module, PolyLayer):
            module.register_forward_pre_hook(tasks.tell, with_kwargs=True)  # type: ignore[attr-defined]
    return tasks
