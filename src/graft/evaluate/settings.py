"""What the `evaluate:` section of a recipe may say. Light."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from graft.data.settings import FIELDS
from graft.errors import Problem, SettingsError, UnknownName
from graft.misfits import near_misses
from graft.settings import DataRef, ModelRef, Settings
from graft.settings import parse as parse_settings

DRAWN = 1
"""Counted up when `limit` draws others."""


class Measure(Settings):
    """What all measures share."""

    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder-decoder")
    """Models that it can be taken of."""

    models: Annotated[
        list[ModelRef] | None, Field(min_length=1, description="Taken of these models only; None: of all.")
    ] = None
    limit: Annotated[
        int | None,
        Field(
            gt=0,
            description="At most so many documents or items of each data set, drawn from all of it by their hashes: "
            "always the same ones.",
        ),
    ] = None


class OnData(Measure):
    """A measure taken on data sets of the recipe."""

    formats: ClassVar[tuple[str, ...]] = (
        "text", "completion", "chat", "labelled", "pairs", "tagged", "spans", "raw",
    )  # fmt: skip
    """Formats of data that it can be taken on."""

    on: Annotated[list[DataRef], Field(min_length=1, description="Data sets, with split: `[code.test]`.")]


class BitsPerByte(OnData):
    """How well text is predicted, whatever the vocabulary: bits per byte of UTF-8."""

    architectures = ("decoder",)
    measure: Literal["bits_per_byte"] = "bits_per_byte"


class Perplexity(OnData):
    """exp of the mean loss per token; comparable between models of one vocabulary only."""

    architectures = ("decoder",)
    measure: Literal["perplexity"] = "perplexity"


class Headed(OnData):
    """What measures share that a head of a model answers as well: one for the kind of task that they are of."""

    kind: ClassVar[str]
    """Of the head. A model without one answers in text."""

    head: Annotated[
        str | None,
        Field(description="Task of the head to use. None: the one that learned from this data set, or the only one."),
    ] = None


ClassMetric = Literal["accuracy", "f1_macro", "f1_micro", "mcc"]


class Classification(Headed):
    """Labelled text: the class that a head finds, or the label that is most probable after the text."""

    formats = ("labelled",)
    kind = "classification"
    measure: Literal["classification"] = "classification"
    metrics: Annotated[list[ClassMetric], Field(min_length=1, description="What is computed.")] = [
        "accuracy",
        "f1_macro",
    ]
    prompt: Annotated[str, Field(description="Template of what stands before the label.")] = "{{ text }}\n"
    labels: Annotated[list[str] | None, Field(description="The labels; None: all that occur in the data.")] = None

    @field_validator("prompt")
    @classmethod
    def _template(cls, text: str) -> str:
        from graft.evaluate.templates import problem

        if wrong := problem(text, FIELDS["labelled"]):
            raise ValueError(wrong)
        return text


TextMetric = Literal["exact_match", "token_f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]


class Generation(OnData):
    """Prompts with completions, or pairs: what the model writes against what it should have written."""

    formats = ("completion", "pairs")
    measure: Literal["generation"] = "generation"
    metrics: Annotated[list[TextMetric], Field(min_length=1, description="What is computed.")] = [
        "exact_match",
        "token_f1",
    ]
    max_tokens: Annotated[int, Field(gt=0, description="Tokens to write at most.")] = 64
    stop: Annotated[list[str], Field(description="Writing ends before any of these.")] = ["\n"]


TagMetric = Literal["token_accuracy", "entity_f1"]


class Tagging(Headed):
    """Tagged tokens: the tags that a head finds, or that the model writes behind the tokens, a space between them."""

    formats = ("tagged",)
    kind = "tagging"
    measure: Literal["tagging"] = "tagging"
    metrics: Annotated[list[TagMetric], Field(min_length=1, description="What is computed.")] = ["token_accuracy"]
    max_tokens: Annotated[int, Field(gt=0, description="Tokens that a model without a head writes at most.")] = 256


SpanMetric = Literal["span_exact_match", "token_f1"]


class Spans(Headed):
    """Questions on a context: the span that a head finds, or the answer that the model writes."""

    formats = ("spans",)
    kind = "spans"
    measure: Literal["spans"] = "spans"
    metrics: Annotated[list[SpanMetric], Field(min_length=1, description="What is computed.")] = [
        "span_exact_match",
        "token_f1",
    ]
    max_tokens: Annotated[int, Field(gt=0, description="Tokens that a model without a head writes at most.")] = 64


class TaskMeasure(Measure):
    """A task from a file: `{task: FILE}`, with or without `measure: task`."""

    task: Annotated[str, Field(description="A YAML or Python file, relative to the recipe's folder.")]


MEASURES: dict[str, type[Measure]] = {
    "bits_per_byte": BitsPerByte,
    "perplexity": Perplexity,
    "classification": Classification,
    "generation": Generation,
    "tagging": Tagging,
    "spans": Spans,
    "task": TaskMeasure,
}
ON_DATA = {name: kind for name, kind in MEASURES.items() if issubclass(kind, OnData)}


def parse(raw: Any, path: tuple[str | int, ...] = ()) -> list[Measure]:
    """The measures of a recipe. Raises SettingsError with every problem found."""
    if not isinstance(raw, list):
        raise SettingsError([Problem(path, f"expected a list of measures, found {raw!r}")])
    measures, problems = [], []
    for place, entry in enumerate(raw):
        try:
            measures.append(parse_one(entry, (*path, place)))
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(problems)
    return measures


def misfit(measure: OnData, format: str) -> str | None:
    """Why `measure` cannot be taken on data of this format, with those that can; None where it can."""
    if format in measure.formats:
        return None
    fitting = ", ".join(name for name, kind in ON_DATA.items() if format in kind.formats)
    return f"expected data of the format {' or '.join(measure.formats)}, found {format}: take {fitting}"


NAME_THEM = "name those to measure with `models: […]`"


def untakable(
    measure: Measure, architectures: Mapping[str, str], heads: Mapping[str, Collection[str]] | None = None
) -> str | None:
    """Why `measure` cannot be taken of models of these architectures (by name); None where it can.

    `heads`: the kinds of heads that each model has.
    """
    asked = {n: a for n, a in architectures.items() if n in (measure.models or architectures)}
    wrong = {n: a for n, a in asked.items() if a not in measure.architectures}
    if isinstance(measure, Headed):
        wrong = {n: a for n, a in wrong.items() if measure.kind not in (heads or {}).get(n, ())}
    if not wrong:
        return None
    found = ", ".join(f"{name} ({architecture})" for name, architecture in wrong.items())
    kinds = " or ".join(measure.architectures)
    kinds += f" or with a head for {measure.kind}" if isinstance(measure, Headed) else ""
    ways = [f"{' or '.join(dict.fromkeys(own))} of {name}" for name in wrong if (own := (heads or {}).get(name))]
    advice = [f"take {', '.join(ways)} (`measure`, --measure)"] if ways else []
    if len(wrong) < len(asked):
        advice.append(NAME_THEM)
    elif not ways:
        encoders = "encoder" in wrong.values()
        advice.append("of an encoder its heads are measured" if encoders else _others(wrong.values()))
    return f"expected models of the architecture {kinds}, found {found}: {', or '.join(advice)}"


def _others(architectures: Collection[str]) -> str:
    """The measures that can be taken of models of all these architectures, in words."""
    possible = [
        f"{name} (of {' or '.join(kind.formats)} data)"
        for name, kind in ON_DATA.items()
        if all(a in kind.architectures for a in architectures)
    ]
    return f"take another `measure` (--measure): {', '.join(possible)}, or a task (`task: FILE`, --task)"


def roomless(
    measure: Measure, max_tokens: int | None, lengths: Mapping[str, int], heads: Mapping[str, Collection[str]]
) -> str | None:
    """Why models that read `lengths` tokens, prompt and answer together, cannot write `max_tokens`; None where all can.

    `heads`: the kinds of heads that each model has, which answer without writing.
    """
    if max_tokens is None:
        return None
    kind = measure.kind if isinstance(measure, Headed) else None
    writing = {n: size for n, size in lengths.items() if n in (measure.models or lengths) and kind not in heads[n]}
    short = {n: size for n, size in writing.items() if size <= max_tokens}
    if not short:
        return None
    name = getattr(measure, "measure", "the task")
    found = ", ".join(f"{model} ({size})" for model, size in short.items())
    room = min(short.values()) // 2
    way = f"set `max_tokens: {room}`, or another below {min(short.values())}" if room else "measure it otherwise"
    others = f", or {NAME_THEM}" if len(short) < len(writing) else ""
    wanted = f"{name} writes up to {max_tokens} tokens: expected models that read more, with room for a prompt"
    return f"{wanted}, found {found}: {way}{others}"


def parse_one(raw: Any, path: tuple[str | int, ...] = ()) -> Measure:
    """One measure. Raises SettingsError with every problem found."""
    if not isinstance(raw, dict) or ("measure" not in raw and "task" not in raw):
        if isinstance(raw, dict) and (near := near_misses(raw, ("measure", "task"), path)):
            raise SettingsError(near)
        names = ", ".join(name for name in MEASURES if name != "task")
        raise SettingsError([Problem(path, f"expected `measure:` ({names}) or `task: FILE`, found {raw!r}")])
    if "task" in raw:
        return parse_settings(TaskMeasure, {k: v for k, v in raw.items() if (k, v) != ("measure", "task")}, path)
    if raw["measure"] not in MEASURES or raw["measure"] == "task":
        unknown = UnknownName("measure", str(raw["measure"]), [name for name in MEASURES if name != "task"])
        raise SettingsError([Problem((*path, "measure"), str(unknown))])
    return parse_settings(MEASURES[raw["measure"]], raw, path)
