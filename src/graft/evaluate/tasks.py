"""Tasks: prompts made from records, and what counts as right.

A task is a YAML file such as

    name: colours
    version: 1
    data: {source: jsonl, path: colours.jsonl, format: raw}
    split: test
    prompt: "Question: {{ question }}\\nAnswer:"
    choices: [" red", " green", " blue"]      # or a template that gives a list: "{{ options }}"
    target: "{{ answer }}"                    # the choice itself or its number
    metrics: [accuracy, accuracy_per_byte]
    shots: 2

or a Python file with a mapping `task` of the same keys, in which the functions `prompt(record)`, `choices(record)` and
`target(record)` stand for templates. Without choices the model writes its answer, up to one of `stop`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from graft.data import AnyCorpus, Corpus, open_corpus, split_ref
from graft.data import parse as parse_data
from graft.errors import DataError, Problem, RequestError, SettingsError
from graft.evaluate.metrics import TEXT_METRICS
from graft.evaluate.templates import Record, template
from graft.settings import DataRef, Settings, parse
from graft.yaml_lines import Document, read_text, read_yaml

Functions = Mapping[str, Callable[[Record], Any]]
"""In the place of templates, by the part of a task that they make."""

PARTS = ("prompt", "choices", "target")
CHOICE_METRICS = ("accuracy", "accuracy_per_byte", "accuracy_per_token", "f1_macro", "f1_micro", "mcc")


class TaskSettings(Settings):
    """What a task's file may say."""

    name: Annotated[str, Field(description="Name in results.")]
    version: Annotated[
        int, Field(ge=1, description="Counted up when the task changes: old results are then not reused.")
    ] = 1
    data: Annotated[
        DataRef | dict[str, Any],
        Field(description="A data set of the recipe (with its split, if wanted: `notes.dev`), or the settings of one."),
    ]
    split: Annotated[Literal["train", "dev", "test"], Field(description="Split that is measured on.")] = "test"
    prompt: Annotated[str | None, Field(description="Template (jinja) of what the model reads.")] = None
    choices: Annotated[
        str | list[str] | None, Field(description="Answers to choose from, or a template of a list.")
    ] = None
    target: Annotated[
        str | None, Field(description="Template of the right answer: the choice or its number, or text.")
    ] = None
    metrics: Annotated[list[str] | None, Field(description="None: accuracy for choices, exact_match for text.")] = None
    shots: Annotated[int, Field(ge=0, description="Solved examples before each prompt.")] = 0
    shots_from: Annotated[Literal["train", "dev"], Field(description="Split the examples come from.")] = "train"
    shots_seed: Annotated[int | None, Field(description="Examples are drawn with this seed; None: the first ones.")] = (
        None
    )
    separator: Annotated[str, Field(description="Between examples.")] = "\n\n"
    max_tokens: Annotated[int, Field(gt=0, description="Tokens to write at most.")] = 64
    stop: Annotated[list[str], Field(description="Writing ends before any of these.")] = ["\n"]

    @model_validator(mode="before")
    @classmethod
    def _split_with_the_data(cls, raw: Any) -> Any:
        """`data: notes.dev` says the split as well."""
        if not isinstance(raw, dict) or not isinstance(raw.get("data"), str):
            return raw
        name, split = split_ref(raw["data"])
        if name == raw["data"]:
            return raw
        if raw.get("split", split) != split:
            raise ValueError(f"expected one split, found `data: {raw['data']}` and `split: {raw['split']}`")
        return {**raw, "split": split}


@dataclass(frozen=True)
class Task:
    """A task ready to use: its settings, the place that errors name (its file, where it has one), and functions from a
    record to prompt, choices (or None) and targets."""

    settings: TaskSettings
    place: str
    prompt: Callable[[Record], str]
    choices: Callable[[Record], list[str]] | None
    target: Callable[[Record], list[str]]

    @property
    def splits(self) -> set[str]:
        """Splits of its data that are read."""
        return {self.settings.split, *([self.settings.shots_from] if self.settings.shots else [])}

    @property
    def metrics(self) -> list[str]:
        """Names of its metrics."""
        return self.settings.metrics or (["exact_match"] if self.choices is None else ["accuracy"])

    def answer(self, record: Record) -> str:
        """The first right answer, as it stands behind a prompt in a solved example."""
        if self.choices is None:
            return self.target(record)[0]
        return self.choices(record)[self.right(record)]

    def right(self, record: Record) -> int:
        """The number of the right choice. Raises DataError where the target is none of them."""
        assert self.choices is not None
        options, target = self.choices(record), self.target(record)[0]
        stripped = [option.strip() for option in options]
        if target.strip() in stripped:
            return stripped.index(target.strip())
        if target.strip().isdigit() and int(target) < len(options):
            return int(target)
        raise DataError(f"{self.place}: expected the target to be one of {stripped} or its number, found {target!r}")


def load_task(path: Path) -> Task:
    """A task from its file. Raises RequestError or SettingsError, naming the file, for what is missing or misspelt."""
    document, functions = read_task(path)
    try:
        return make_task(parse(TaskSettings, document.value), functions, str(path))
    except SettingsError as error:
        raise in_file(path, document, error.problems) from None


def read_task(path: Path) -> tuple[Document, Functions]:
    """What a task's file says, as it stands there, and its functions. Raises RequestError, naming the file."""
    if not path.is_file():
        raise RequestError(f"{path}: expected a task's file, found none; paths are relative to the recipe's folder")
    document, functions = _python(path) if path.suffix == ".py" else (read_yaml(read_text(path, "a task's file")), {})
    if document.problems:
        raise in_file(path, document, document.problems)
    if not isinstance(document.value, dict):
        found = type(document.value).__name__
        raise RequestError(f"{path}: expected a mapping (name, data, prompt, target, …), found {found}")
    return document, functions


def in_file(path: Path, document: Document, problems: Sequence[Problem]) -> SettingsError:
    """The problems, each with the file and its line there in its message."""
    located = [document.located(problem) for problem in problems]
    return SettingsError([Problem((), f"{path}{': ' if p.line is None else ', '}{p}") for p in located])


def make_task(settings: TaskSettings, functions: Functions | None = None, place: str = "") -> Task:
    """A task from settings, with functions in the place of templates where given; errors on records name `place`.

    Raises SettingsError with every problem.
    """
    functions = functions or {}
    made: dict[str, Callable[[Record], Any] | None] = {}
    problems = []
    for name in PARTS:
        try:
            made[name] = _part(name, settings, functions)
        except RequestError as error:
            problems.append(Problem((name,), str(error)))
            continue
        if made[name] is None and name != "choices":
            problems.append(Problem((name,), f"expected `{name}`, found none"))
    if settings.shots and settings.shots_from == settings.split:
        told = f"expected shots from another split than {settings.split}, which is measured on"
        problems.append(Problem(("shots_from",), told))
    known = TEXT_METRICS if made.get("choices", settings.choices) is None else CHOICE_METRICS
    if wrong := [name for name in settings.metrics or () if name not in known]:
        told = f"expected metrics among {', '.join(known)}, found {', '.join(wrong)}"
        problems.append(Problem(("metrics",), told))
    if problems:
        raise SettingsError(problems)
    place = place or settings.name
    return Task(settings, place, **{name: _named(name, part, place) for name, part in made.items()})


def _part(name: str, settings: TaskSettings, functions: Functions) -> Callable[[Record], Any] | None:
    """The function that is given for a part, or what its template writes. Raises RequestError for a broken template."""
    written = getattr(settings, name)
    if name in functions or written is None:
        return functions.get(name)
    if isinstance(written, str):
        return template(written)
    templates = [template(text) for text in written]
    return lambda record: [one(record) for one in templates]


def _named(name: str, part: Callable[[Record], Any] | None, place: str) -> Any:
    """The part with what it gives as text or a list of texts; what it raises names `place`."""
    if part is None:
        return None
    shaped = _as_text if name == "prompt" else _as_list

    def call(record: Record) -> Any:
        try:
            return shaped(part(record))
        except DataError as error:
            raise DataError(f"{place}: `{name}`: {error}") from None
        except Exception as error:  # a function of the task's file, which may raise anything
            found = f"{type(error).__name__}: {error}; the record has {', '.join(map(str, record))}"
            raise DataError(f"{place}: {name}(record) raised {found}") from error

    return call


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"expected text, found {type(value).__name__} {str(value)[:60]!r}")
    return value


def _as_list(value: Any) -> list[str]:
    """A list of strings from a list, or from the text of one. Raises DataError for an empty one."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return [value]
    found = [str(entry) for entry in value] if isinstance(value, list | tuple) else [str(value)]
    if not found:
        raise DataError("expected something, found an empty list")
    return found


def _python(path: Path) -> tuple[Document, Functions]:
    """What the mapping `task` of a file says, and the functions, which stand beside it or in it."""
    module = _module(path)
    if not isinstance(getattr(module, "task", None), dict):
        raise RequestError(f"{path}: expected a mapping `task` in the file, found none")
    given = {name: getattr(module, name, None) for name in PARTS} | {
        k: v for k, v in module.task.items() if callable(v)
    }
    plain = {key: value for key, value in module.task.items() if not callable(value)}
    return Document(plain), {name: given[name] for name in PARTS if callable(given[name])}


def _module(path: Path) -> Any:
    """The file as a module. Raises RequestError, naming it, for code that cannot be read or fails."""
    spec = importlib.util.spec_from_file_location(f"graft_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise RequestError(f"{error.filename}, line {error.lineno}: expected Python, found {error.msg}") from None
    except Exception as error:  # code of the user's, which may raise anything
        raise RequestError(f"{path}: the file raised {type(error).__name__}: {error}") from error
    return module


def data_of(task: TaskSettings, file: Path, sets: Mapping[str, Any], root: Path) -> AnyCorpus:
    """The data that the task in `file` reads: its own, or the one it names of `sets`, whose paths start from `root`."""
    own = own_data(task, file)
    return open_corpus(sets, split_ref(str(task.data))[0], root) if own is None else own


def own_data(task: TaskSettings, file: Path) -> AnyCorpus | None:
    """The data whose settings stand in the task's `file`, from whose folder paths start; None where it names a set."""
    if isinstance(task.data, str):
        return None
    return open_corpus({task.name: parse_data(task.data, (file.name, "data"))}, task.name, file.parent)


def try_out(task: Task, corpus: Corpus) -> None:
    """Prompt and answer of the first records. Raises DataError where one cannot be made."""
    for split, record in corpus.first():
        if split in task.splits:
            task.prompt(record)
            task.answer(record)


def shots(task: Task, examples: Sequence[Record]) -> str:
    """The solved examples, ready to stand before a prompt."""
    solved = [task.prompt(example) + task.answer(example) for example in examples]
    return "".join(text + task.settings.separator for text in solved)
