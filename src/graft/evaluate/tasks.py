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

import yaml
from pydantic import Field

from graft.errors import DataError, RequestError
from graft.evaluate.metrics import TEXT_METRICS
from graft.settings import DataRef, Settings, parse

Record = Mapping[str, Any]

CHOICE_METRICS = ("accuracy", "accuracy_per_byte", "accuracy_per_token", "f1_macro", "f1_micro", "mcc")


class TaskSettings(Settings):
    """What a task's file may say."""

    name: Annotated[str, Field(description="Name in results.")]
    version: Annotated[
        int, Field(ge=1, description="Counted up when the task changes: old results are then not reused.")
    ] = 1
    data: Annotated[DataRef | dict[str, Any], Field(description="A data set of the recipe, or the settings of one.")]
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


@dataclass(frozen=True)
class Task:
    """A task ready to use: its settings, and functions from a record to prompt, choices (or None) and targets."""

    settings: TaskSettings
    prompt: Callable[[Record], str]
    choices: Callable[[Record], list[str]] | None
    target: Callable[[Record], list[str]]

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
        raise DataError(
            f"{self.settings.name}: expected the target to be one of {stripped} or its number, found {target!r}"
        )


def load_task(path: Path) -> Task:
    """A task from its file. Raises RequestError or SettingsError, naming the file, for what is missing or misspelt."""
    if not path.is_file():
        raise RequestError(f"{path}: expected a task's file, found none; paths are relative to the recipe's folder")
    raw, functions = _python(path) if path.suffix == ".py" else (_yaml(path), {})
    settings = parse(TaskSettings, raw, (path.name,))
    return make_task(settings, functions, str(path))


def make_task(
    settings: TaskSettings, functions: Mapping[str, Callable[[Record], Any]] | None = None, place: str = ""
) -> Task:
    """A task from settings, with functions in the place of templates where given."""
    functions = functions or {}
    for name in ("prompt", "target"):
        if getattr(settings, name) is None and name not in functions:
            raise RequestError(f"{place or settings.name}: expected `{name}`, found none")
    if settings.shots and settings.shots_from == settings.split:
        raise RequestError(
            f"{place or settings.name}: expected shots from another split than {settings.split}, which is measured on"
        )
    prompt = functions.get("prompt") or _template(settings.prompt or "")
    target = functions.get("target") or _template(settings.target or "")
    task = Task(settings, prompt, _choices(settings, functions), lambda record: _as_list(target(record)))
    known = TEXT_METRICS if task.choices is None else CHOICE_METRICS
    wrong = [name for name in task.metrics if name not in known]
    if wrong:
        raise RequestError(
            f"{place or settings.name}: expected metrics among {', '.join(known)}, found {', '.join(wrong)}"
        )
    return task


def _choices(
    settings: TaskSettings, functions: Mapping[str, Callable[[Record], Any]]
) -> Callable[[Record], list[str]] | None:
    if "choices" in functions:
        return functions["choices"]
    if settings.choices is None:
        return None
    if isinstance(settings.choices, list):
        templates = [_template(choice) for choice in settings.choices]
        return lambda record: [template(record) for template in templates]
    template = _template(settings.choices)
    return lambda record: _as_list(template(record))


def _as_list(value: Any) -> list[str]:
    """A list of strings from a list, or from the text of one."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return [value]
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else [str(value)]


def _template(text: str) -> Callable[[Record], str]:
    """A template in a sandbox: it sees the record's fields and can do nothing else; a missing field is an error."""
    from jinja2 import StrictUndefined, UndefinedError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)

    def render(record: Record) -> str:
        try:
            return made.render(record)
        except UndefinedError as error:
            raise DataError(f"template {text!r}: {error}; the record has {', '.join(map(str, record))}") from None

    return render


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: expected YAML ({error})") from None


def _python(path: Path) -> tuple[Any, dict[str, Callable[[Record], Any]]]:
    spec = importlib.util.spec_from_file_location(f"graft_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "task", None), dict):
        raise RequestError(f"{path}: expected a mapping `task` in the file, found none")
    names = ("prompt", "choices", "target")
    # beside the mapping or in it
    given = {name: getattr(module, name, None) for name in names} | {
        k: v for k, v in module.task.items() if callable(v)
    }
    plain = {key: value for key, value in module.task.items() if not callable(value)}
    return plain, {name: given[name] for name in names if callable(given[name])}


def shots(task: Task, examples: Sequence[Record]) -> str:
    """The solved examples, ready to stand before a prompt."""
    solved = [task.prompt(example) + task.answer(example) for example in examples]
    return "".join(text + task.settings.separator for text in solved)
