"""The typed recipe: a whole family tree in one YAML file, checked before anything runs.

`read_recipe` reports everything that is wrong at once, each problem with its line. What it returns is complete: every
setting resolved, every name known, the order of the nodes found, and the facts of each model that is to be made.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from graft import data as data_room
from graft import verbs
from graft.data import DataSettings, open_corpus, split_ref
from graft.data.settings import HuggingFace
from graft.errors import CheckpointError, Problem, RecipeError, RequestError, SettingsError, nearest
from graft.settings import Settings, keys_of, parse, references
from graft.verb import Facts, Verb
from graft.yaml_lines import Document, read_yaml

Where = tuple[str | int, ...]
T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Outline(Settings):
    """The sections of a recipe. `data`, `models` and `evaluate` are read by those whose they are."""

    family: Annotated[str, Field(description="Names the folder of the run, `runs/FAMILY`.")]
    seed: Annotated[int, Field(ge=0, description="Seed of everything random; a node may have its own.")] = 0
    data: Annotated[dict[str, Any], Field(description="Data sets by name.")] = {}
    models: Annotated[dict[str, Any], Field(min_length=1, description="Models by name.")]
    evaluate: Annotated[list[Any], Field(description="Measures, taken of every model.")] = []


@dataclass(frozen=True)
class Node:
    """One model of a recipe: what makes it, and of what."""

    name: str
    verb: Verb[Any]
    settings: Settings
    seed: int
    line: int | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models it is made from, in the order in which the settings name them."""
        return self._named("model")

    @property
    def data(self) -> tuple[str, ...]:
        """The data sets it uses, as written: `mixed` or `mixed.dev`."""
        return self._named("data")

    def _named(self, kind: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for k, name, _ in references(self.settings) if k == kind))


@dataclass(frozen=True)
class Recipe:
    """A family that has been checked. `models` stand in an order in which they can be made."""

    family: str
    seed: int
    data: Mapping[str, DataSettings]
    models: Mapping[str, Node]
    evaluate: Sequence[Any]
    root: Path
    """The folder that relative paths start from."""
    text: str = ""
    """The file as it was read."""
    outside: Mapping[str, Path] = field(default_factory=dict)
    """Folders of finished models that nodes name without making them."""

    def facts(self, key: Callable[[str], str] = lambda name: name) -> dict[str, Facts]:
        """Facts of every model; `key` gives what identifies a node (its name, where the true key is not needed)."""
        from graft.lineage import facts_of

        found = {name: facts_of(folder) for name, folder in self.outside.items()}
        for name, node in self.models.items():
            found[name] = node.verb.facts(node.settings, {m: found[m] for m in node.models}, key(name))
        return found

    def ancestors(self, names: Iterable[str]) -> list[str]:
        """`names` and all that they are made from, in the recipe's order."""
        wanted, waiting = set(), list(names)
        while waiting:
            name = waiting.pop()
            if name not in wanted and name in self.models:
                wanted.add(name)
                waiting += self.models[name].models
        return [name for name in self.models if name in wanted]


def read_recipe(path: Path | str) -> Recipe:
    """The recipe in a YAML file. Raises RecipeError with all problems, RequestError where there is no such file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"expected a recipe (a YAML file) at {path}, found none that can be read: {error}") from None
    return build_recipe(read_yaml(text), path.resolve().parent, text=text)


def build_recipe(
    document: Document, root: Path, *, text: str = "", outside: Mapping[str, Path] | None = None
) -> Recipe:
    """The recipe that `document` says, checked. Raises RecipeError with all problems."""
    reader = _Reader(document, root, dict(outside or {}))
    recipe = reader.read(text)
    if reader.problems or recipe is None:
        located = {str(p): p for p in map(document.located, [*document.problems, *reader.problems])}
        raise RecipeError(sorted(located.values(), key=lambda p: p.line or 0))
    return recipe


class _Reader:
    """Walks a document once; what is wrong is noted, and what rests on it is left out."""

    def __init__(self, document: Document, root: Path, outside: dict[str, Path]):
        self.document, self.root, self.outside = document, root, outside
        self.problems: list[Problem] = list(document.problems)

    def read(self, text: str) -> Recipe | None:
        outline = self._outline()
        if outline is None:
            return None
        sets = {name: s for name, raw in outline.data.items() if (s := self._data(name, raw)) is not None}
        nodes = {name: n for name, raw in outline.models.items() if (n := self._node(name, raw, outline.seed))}
        measures = self._measures(outline.evaluate)
        self._names(outline, sets, nodes, measures)
        self._formats(sets, nodes, measures)
        data_order = self._ordered("data", {name: _parts(settings) for name, settings in sets.items()})
        order = self._ordered("models", {name: node.models for name, node in nodes.items()})
        recipe = Recipe(
            outline.family,
            outline.seed,
            {name: sets[name] for name in data_order},
            {name: nodes[name] for name in order},
            list(measures.values()),
            self.root,
            text,
            self.outside,
        )
        facts = self._combinations(recipe)
        if measures:
            self._takable(measures, {name: facts[name].architecture for name in nodes if name in facts})
        return recipe

    def problem(self, path: Where, message: str) -> None:
        self.problems.append(Problem(path, message))

    def attempt(self, path: Where, action: Callable[[], T]) -> T | None:
        """What `action` gives; None where it raises a RequestError, which is noted."""
        try:
            return action()
        except SettingsError as error:
            self.problems += error.problems
        except (RequestError, CheckpointError) as error:
            self.problem(path, str(error))
        return None

    def _outline(self) -> Outline | None:
        raw = self.document.value
        if not isinstance(raw, dict):
            if not self.problems:
                self.problem((), f"expected the sections {', '.join(keys_of(Outline))}, found {type(raw).__name__}")
            return None
        # an empty section is one that is not there
        given = {key: value for key, value in raw.items() if value is not None}
        outline = self.attempt((), lambda: parse(Outline, given)) or _readable(given)
        for section, names in (("data", outline.data), ("models", outline.models), ("family", [outline.family])):
            for name in names:
                if not NAME.fullmatch(name):
                    place = (section, name) if section != "family" else (section,)
                    self.problem(place, f"expected a name of letters, digits, - and _, found {name!r}")
        return outline

    def _data(self, name: str, raw: Any) -> DataSettings | None:
        settings = self.attempt(("data", name), lambda: data_room.parse(raw, ("data", name)))
        if settings is not None:
            for message in data_room.problems(settings, self.root):
                self.problem(("data", name), message)
        return settings

    def _node(self, name: str, raw: Any, seed: int) -> Node | None:
        path: Where = ("models", name)
        if not isinstance(raw, dict) or len(verbs_named := [key for key in raw if key != "seed"]) != 1:
            names = ", ".join(verbs.verb_names())
            self.problem(path, f"expected one verb with its settings ({names}), and `seed:` if wanted, found {raw!r}")
            return None
        own_seed = raw.get("seed", seed)
        if not isinstance(own_seed, int) or isinstance(own_seed, bool) or own_seed < 0:
            self.problem((*path, "seed"), f"expected a whole number from 0, found {own_seed!r}")
            own_seed = seed
        (named,) = verbs_named
        verb = self.attempt((*path, named), lambda: verbs.verb(str(named)))
        if verb is None:
            return None
        settings = self.attempt((*path, named), lambda: verb.located(verb.parse(raw[named], (*path, named)), self.root))
        return None if settings is None else Node(name, verb, settings, own_seed, self.document.line(path))

    def _measures(self, raw: list[Any]) -> Mapping[int, Any]:
        """Measures by their place in the list."""
        if not raw:
            return {}
        from graft import evaluate

        found = {}
        for place, entry in enumerate(raw):
            path = ("evaluate", place)
            measure = self.attempt(path, lambda: evaluate.parse_one(entry, path))  # noqa: B023
            if isinstance(measure, evaluate.TaskMeasure) and not (self.root / measure.task).is_file():
                self.problem((*path, "task"), f"expected a task's file at {self.root / measure.task}")
            if measure is not None:
                found[place] = measure
        return found

    def _names(
        self, outline: Outline, sets: Mapping[str, DataSettings], nodes: Mapping[str, Node], measures: Mapping[int, Any]
    ) -> None:
        """Everything that is named must be there; what was written but did not parse has been reported already."""
        placed: list[tuple[Where, Settings]] = [(("data", name), settings) for name, settings in sets.items()]
        placed += [(("models", name, node.verb.name), node.settings) for name, node in nodes.items()]
        placed += [(("evaluate", place), measure) for place, measure in measures.items()]
        models = [*outline.models, *self.outside]
        for start, settings in placed:
            for kind, name, path in references(settings, start):
                known = split_ref(name)[0] in outline.data if kind == "data" else name in models
                if not known:
                    valid = list(outline.data) if kind == "data" else models
                    kind_words = "data set" if kind == "data" else "model"
                    there = ", ".join(sorted(valid)) or "none"
                    self.problem(path, f"unknown {kind_words} {name!r}{nearest(name, valid)}; there are: {there}")

    def _formats(
        self, sets: Mapping[str, DataSettings], nodes: Mapping[str, Node], measures: Mapping[int, Any]
    ) -> None:
        """What is trained on must say what is to be produced, and a measure must fit the data it is taken on."""
        formats = self._known_formats(sets)
        for name, node in nodes.items():
            if raw := [ref for ref in node.data if formats.get(split_ref(ref)[0]) == "raw"]:
                wrong = (
                    f"{raw[0]} is raw: records that do not say what is to be produced; give its `format` and `fields`"
                )
                self.problem(("models", name, node.verb.name), wrong)
        for place, measure in measures.items():
            from graft import evaluate

            for reference in measure.on if isinstance(measure, evaluate.OnData) else ():
                format = formats.get(split_ref(reference)[0])
                if format is not None and (misfit := evaluate.misfit(measure, reference, format)):
                    self.problem(("evaluate", place, "on"), misfit)

    def _known_formats(self, sets: Mapping[str, DataSettings]) -> dict[str, str]:
        """Formats of the data sets with which nothing is wrong, as far as a look at their first records tells."""
        wrong = {problem.path[1] for problem in self.problems if problem.path[:1] == ("data",) and problem.path[1:]}
        far = {name for name, settings in sets.items() if isinstance(settings, HuggingFace)}
        formats = {}
        for name in sets:
            parts = _all_parts(name, sets)
            if parts is None or parts & (wrong | far):
                continue
            format = self.attempt(("data", name), lambda: open_corpus(sets, name, self.root).format)  # noqa: B023
            if format is not None:
                formats[name] = format
        return formats

    def _ordered(self, section: str, graph: Mapping[str, Iterable[str]]) -> list[str]:
        """The names, each after what it is made from; as written where both would do. Notes every cycle."""
        known = {name: [p for p in parents if p in graph] for name, parents in graph.items()}
        try:
            return _stable_order(known)
        except CycleError as error:
            cycle = list(reversed(error.args[1]))
            start = min(range(len(cycle) - 1), key=lambda i: list(graph).index(cycle[i]))
            shown = [*cycle[start:-1], *cycle[:start], cycle[start]]
            self.problem((section, shown[0]), f"expected a tree, found a cycle: {' ← '.join(shown)}")
            rest = {name: parents for name, parents in graph.items() if name not in cycle}
            return self._ordered(section, rest)

    def _combinations(self, recipe: Recipe) -> Mapping[str, Facts]:
        """Ask every verb whether its node can work, given the facts of what it is made from; the facts found."""
        from graft.lineage import facts_of

        found: dict[str, Facts] = {}
        for name, folder in recipe.outside.items():
            facts = self.attempt(("models",), lambda folder=folder: facts_of(folder))  # type: ignore[misc]
            if facts is not None:
                found[name] = facts
        for name, node in recipe.models.items():
            if not all(model in found for model in node.models):
                continue
            path = ("models", name, node.verb.name)
            models = {model: found[model] for model in node.models}
            wrong = node.verb.check(node.settings, models)
            for message in wrong:
                self.problem(path, message)
            facts = None if wrong else self.attempt(path, lambda: node.verb.facts(node.settings, models, name))  # noqa: B023
            if facts is not None:
                found[name] = facts
        return found

    def _takable(self, measures: Mapping[int, Any], architectures: Mapping[str, str]) -> None:
        from graft import evaluate

        for place, measure in measures.items():
            if wrong := evaluate.untakable(measure, architectures):
                self.problem(("evaluate", place), wrong)


def _readable(given: Mapping[str, Any]) -> Outline:
    """What can be read of sections that are not all right: so that the problems further down are told as well."""
    names = {key: key if key in keys_of(Outline) else _closest(key) for key in given}
    filler: dict[str, Any] = {"family": "unnamed", "models": {"": None}}
    readable: dict[str, Any] = {"family": "unnamed", "models": {}}
    for key, name in names.items():
        try:
            readable[name] = getattr(parse(Outline, {**filler, name: given[key]}), name)
        except SettingsError:
            continue
    return Outline.model_construct(**readable)


def _closest(key: str) -> str:
    return next(iter(difflib.get_close_matches(key, keys_of(Outline), n=1, cutoff=0.6)), key)


def _parts(settings: DataSettings) -> list[str]:
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
            waiting += _parts(sets[part])
    return found


def _stable_order(graph: Mapping[str, Sequence[str]]) -> list[str]:
    """Topological order that keeps the written order where it can. Raises CycleError."""
    TopologicalSorter(graph).prepare()
    order: dict[str, None] = {}

    def place(name: str) -> None:
        if name not in order:
            for parent in graph[name]:
                place(parent)
            order[name] = None

    for name in graph:
        place(name)
    return list(order)
