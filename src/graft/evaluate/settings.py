"""What the `evaluate:` section of a recipe may say. Light."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from graft.errors import Problem, SettingsError, UnknownName
from graft.settings import DataRef, Settings
from graft.settings import parse as parse_settings


class Measure(Settings):
    """What all measures share."""

    limit: Annotated[int | None, Field(gt=0, description="At most so many documents or items of each data set.")] = None


class OnData(Measure):
    """A measure taken on data sets of the recipe."""

    on: Annotated[list[DataRef], Field(min_length=1, description="Data sets, with split: `[code.test]`.")]


class BitsPerByte(OnData):
    """How well text is predicted, whatever the vocabulary: bits per byte of UTF-8."""

    measure: Literal["bits_per_byte"] = "bits_per_byte"


class Perplexity(OnData):
    """exp of the mean loss per token; comparable between models of one vocabulary only."""

    measure: Literal["perplexity"] = "perplexity"


ClassMetric = Literal["accuracy", "f1_macro", "f1_micro", "mcc"]


class Classification(OnData):
    """Labelled text: the label to which the model gives the highest probability after the text."""

    measure: Literal["classification"] = "classification"
    metrics: Annotated[list[ClassMetric], Field(min_length=1, description="What is computed.")] = [
        "accuracy",
        "f1_macro",
    ]
    prompt: Annotated[str, Field(description="Template of what stands before the label.")] = "{{ text }}\n"
    labels: Annotated[list[str] | None, Field(description="The labels; None: all that occur in the data.")] = None


TextMetric = Literal["exact_match", "token_f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]


class Generation(OnData):
    """Prompts with completions, or pairs: what the model writes against what it should have written."""

    measure: Literal["generation"] = "generation"
    metrics: Annotated[list[TextMetric], Field(min_length=1, description="What is computed.")] = [
        "exact_match",
        "token_f1",
    ]
    max_tokens: Annotated[int, Field(gt=0, description="Tokens to write at most.")] = 64
    stop: Annotated[list[str], Field(description="Writing ends before any of these.")] = ["\n"]


class TaskMeasure(Measure):
    """A task from a file: `{task: FILE}`, with or without `measure: task`."""

    task: Annotated[str, Field(description="A YAML or Python file, relative to the recipe's folder.")]


MEASURES: dict[str, type[Measure]] = {
    "bits_per_byte": BitsPerByte,
    "perplexity": Perplexity,
    "classification": Classification,
    "generation": Generation,
    "task": TaskMeasure,
}


def parse(raw: Any, path: tuple[str | int, ...] = ()) -> list[Measure]:
    """The measures of a recipe. Raises SettingsError with every problem found."""
    if not isinstance(raw, list):
        raise SettingsError([Problem(path, f"expected a list of measures, found {raw!r}")])
    measures, problems = [], []
    for place, entry in enumerate(raw):
        try:
            measures.append(_one(entry, (*path, place)))
        except SettingsError as error:
            problems += error.problems
        except UnknownName as error:
            problems.append(Problem((*path, place, "measure"), str(error)))
    if problems:
        raise SettingsError(problems)
    return measures


def _one(raw: Any, path: tuple[str | int, ...]) -> Measure:
    if not isinstance(raw, dict) or ("measure" not in raw and "task" not in raw):
        names = ", ".join(name for name in MEASURES if name != "task")
        raise SettingsError([Problem(path, f"expected `measure:` ({names}) or `task: FILE`, found {raw!r}")])
    if "task" in raw:
        return parse_settings(TaskMeasure, {k: v for k, v in raw.items() if (k, v) != ("measure", "task")}, path)
    if raw["measure"] not in MEASURES or raw["measure"] == "task":
        raise UnknownName("measure", str(raw["measure"]), [name for name in MEASURES if name != "task"])
    return parse_settings(MEASURES[raw["measure"]], raw, path)
