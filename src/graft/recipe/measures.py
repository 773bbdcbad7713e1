"""Reading the measures of a recipe, and whether they fit the data and the models they are taken of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft import evaluate
from graft.data import DataSettings, open_corpus, split_ref
from graft.data.settings import HuggingFace
from graft.evaluate.limits import named_length
from graft.evaluate.tasks import Task
from graft.recipe.problems import Problems, Where
from graft.recipe.sections import Node
from graft.settings import references
from graft.verb import Facts

Measures = Mapping[int, evaluate.Measure]
"""Measures by their place in the list: some may not have parsed."""


def read_measures(raw: Sequence[Any], problems: Problems) -> tuple[Measures, set[int]]:
    """What can be read of the measures, and which of them are not all that was meant."""
    found, unsure = {}, set()
    for place, entry in enumerate(raw):
        path = ("evaluate", place)
        measure, sure = problems.salvage(path, lambda raw: evaluate.parse_one(raw, path), entry)  # noqa: B023
        if measure is not None:
            found[place] = measure
        if not sure:
            unsure.add(place)
    return found, unsure


def check_formats(
    sets: Mapping[str, DataSettings], nodes: Mapping[str, Node], measures: Measures, root: Path, problems: Problems
) -> Mapping[str, str]:
    """What is trained on must say what is to be produced, and a measure must fit the data it is taken on.

    The formats found, by name.
    """
    formats = _formats(sets, root, problems)
    for name, node in nodes.items():
        measured = node.verb.measured(node.settings)
        for reference, measure in measured.items():
            _check_fit(measure, reference, formats, ("models", name, node.verb.name), problems)
        if raw := [ref for ref in node.data if ref not in measured and formats.get(split_ref(ref)[0]) == "raw"]:
            problems.note(
                ("models", name, node.verb.name),
                f"{raw[0]} is raw: records that do not say what is to be produced; give its `format` and `fields`",
            )
    for place, measure in measures.items():
        for reference in measure.on if isinstance(measure, evaluate.OnData) else ():
            _check_fit(measure, reference, formats, ("evaluate", place, "on"), problems)
    return formats


def _check_fit(
    measure: evaluate.Measure, reference: str, formats: Mapping[str, str], path: Where, problems: Problems
) -> None:
    """Note where a measure cannot be taken on a data set."""
    format = formats.get(split_ref(reference)[0])
    if not isinstance(measure, evaluate.OnData) or format is None:
        return
    if wrong := evaluate.misfit(measure, format):
        problems.note(path, f"{measure.measure} on {reference}: {wrong}")  # type: ignore[attr-defined]


def check_unseen(
    sets: Mapping[str, DataSettings], nodes: Mapping[str, Node], measures: Measures, problems: Problems
) -> None:
    """No measure on a test or dev split that a node names to learn from: it would praise what was learned by heart."""
    learned: dict[str, str] = {}
    for name, node in nodes.items():
        for reference in set(node.data) - set(node.verb.shown(node.settings)):
            learned |= dict.fromkeys(_split_parts(reference, sets), name)
    for place, measure in measures.items():
        for reference in measure.on if isinstance(measure, evaluate.OnData) else ():
            if split_ref(reference)[1] == "test" and (seen := _split_parts(reference, sets) & learned.keys()):
                part = min(seen)
                problems.note(
                    ("evaluate", place, "on"),
                    f"{learned[part]} learns from {part}, so that nothing measured on it counts: let it learn from "
                    "another split, or measure on another",
                )


def _split_parts(reference: str, sets: Mapping[str, DataSettings]) -> set[str]:
    """`mixed.test` → the same split of all that it is mixed from, itself included."""
    name, split = split_ref(reference)
    return {f"{part}.{split}" for part in _all_parts(name, sets) or {name}}


def check_models(
    measures: Measures, tasks: Mapping[int, Task], models: Mapping[str, Facts], problems: Problems
) -> None:
    """A measure must fit the models that it is taken of, and these must have a tokenizer and room for what they write.

    `tasks`: those that the measures name, by the place of the measure.
    """
    architectures = {name: facts.architecture for name, facts in models.items()}
    heads = {name: facts.heads.values() for name, facts in models.items()}
    lengths = _lengths(models)
    silent = {name for name, facts in models.items() if facts.tokenizer == frozenset()}
    for place, measure in measures.items():
        if wrong := evaluate.untakable(measure, architectures, heads):
            problems.note(("evaluate", place), wrong)
        task = tasks.get(place)
        if wrong := evaluate.roomless(measure, _most_written(measure, task), lengths, heads):
            where = "max_tokens" if task is None else "task"
            problems.note(("evaluate", place, where), wrong if task is None else f"{task.place}: max_tokens: {wrong}")
        for name in sorted(silent.intersection(measure.models or models)):
            problems.note(
                ("evaluate", place),
                f"{name} has no tokenizer, so that it reads no text: put its tokenizer.json into its folder, or name "
                "those to measure with `models: […]`",
            )


def _lengths(models: Mapping[str, Facts]) -> dict[str, int]:
    """Tokens that each decoder reads, prompt and answer together, as far as configurations tell."""
    known = {name: named_length(facts.config) for name, facts in models.items() if facts.architecture == "decoder"}
    return {name: length for name, length in known.items() if length is not None}


def _most_written(measure: evaluate.Measure, task: Task | None) -> int | None:
    """The most tokens that are written for an item; None where nothing is written."""
    if task is None:
        return getattr(measure, "max_tokens", None)
    return task.settings.max_tokens if task.choices is None else None


def _formats(sets: Mapping[str, DataSettings], root: Path, problems: Problems) -> dict[str, str]:
    """Formats of the data sets on this machine with which nothing is wrong, as far as their first records tell."""
    far = {name for name, settings in sets.items() if isinstance(settings, HuggingFace) and settings.hub}
    unknown = problems.of("data") | far
    formats = {}
    for name in sets:
        parts = _all_parts(name, sets)
        if parts is None or parts & unknown:
            continue
        format = problems.attempt(("data", name), lambda: open_corpus(sets, name, root).format)  # noqa: B023
        if format is not None:
            formats[name] = format
    return formats


def parts_of(settings: DataSettings) -> list[str]:
    """The data sets that this one is mixed from."""
    return [split_ref(name)[0] for kind, name, _ in references(settings) if kind == "data"]


def _all_parts(name: str, sets: Mapping[str, DataSettings]) -> set[str] | None:
    """A data set and all that it is mixed from; None where one is missing or is mixed from itself."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        part = waiting.pop()
        if part not in sets or (part == name and found):
            return None
        if part not in found:
            found.add(part)
            waiting += parts_of(sets[part])
    return found
