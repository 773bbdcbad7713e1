"""Whether the tasks of a recipe can be done: their files, the data they read, and their templates on its records."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft import data as data_room
from graft import evaluate
from graft.data import AnyCorpus, DataSettings, open_corpus, split_ref
from graft.data.settings import HuggingFace
from graft.errors import RequestError, SettingsError, UnknownName
from graft.evaluate.tasks import Task, TaskSettings, in_file, make_task, read_task, try_out
from graft.recipe.measures import Measures
from graft.recipe.problems import Problems, Where
from graft.settings import parse


@dataclass(frozen=True)
class Sets:
    """The data sets of a recipe: all their names, the settings of those that parse, and which of them can be opened."""

    names: Collection[str]
    settings: Mapping[str, DataSettings]
    sound: Collection[str]
    root: Path


def check_tasks(measures: Measures, sets: Sets, problems: Problems) -> dict[int, Task]:
    """Read every task and make its first prompts and answers; what is wrong is noted with its line in its file.

    The tasks that say all that was meant, by the place of their measures.
    """
    tasks = {}
    for place, measure in measures.items():
        if isinstance(measure, evaluate.TaskMeasure):
            task, messages = _read(sets.root / measure.task, sets)
            for message in messages:
                problems.note(("evaluate", place, "task"), message)
            if task is not None:
                tasks[place] = task
    return tasks


def _read(file: Path, sets: Sets) -> tuple[Task | None, list[str]]:
    """The task in a file, if it says all that was meant, and what is wrong with it."""
    try:
        document, functions = read_task(file)
    except RequestError as error:
        return None, _messages(error)
    own = Problems()
    task, sure = own.salvage((), lambda raw: make_task(parse(TaskSettings, raw), functions, str(file)), document.value)
    corpus = _corpus(document.value, file, sets, own)
    found = _messages(in_file(file, document, own.found)) if own.found else []
    if task is None or corpus is None:
        return task if sure else None, found
    return task if sure else None, found + _tried(task, corpus, sure, file)


def _messages(error: RequestError) -> list[str]:
    return [str(p) for p in error.problems] if isinstance(error, SettingsError) else [str(error)]


def _corpus(raw: Mapping[str, Any], file: Path, sets: Sets, own: Problems) -> AnyCorpus | None:
    """The data of a task; None where something is wrong with it, or where it is not read beforehand."""
    place: Where = ("data",)
    written = raw.get("data")
    if isinstance(written, str):
        name = split_ref(written)[0]
        if name not in sets.names:
            own.note(place, str(UnknownName("data set", name, sets.names)))
        return open_corpus(sets.settings, name, sets.root) if name in sets.sound else None
    if not isinstance(written, dict):
        return None  # the task's settings say so
    settings, sure = own.salvage(place, lambda raw: data_room.parse(raw, place), written)
    if settings is None or not sure:
        return None
    wrong = data_room.problems(settings, file.parent)
    for message in wrong:
        own.note(place, message)
    if wrong or (isinstance(settings, HuggingFace) and settings.hub):
        return None
    return own.attempt(place, lambda: open_corpus({file.stem: settings}, file.stem, file.parent))


def _tried(task: Task, corpus: AnyCorpus, sure: bool, file: Path) -> list[str]:
    """What goes wrong with the first records; which splits there must be is known where the settings are `sure`."""
    try:
        for part, _ in corpus.parts:
            if sure and (empty := part.lacking(task.splits)):
                return [f"{file}: {message}" for message in empty]
            try_out(task, part)
    except RequestError as error:
        return [str(error)]
    return []
