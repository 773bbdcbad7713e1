"""Reading a recipe: one walk over the document, after which all that is wrong is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft import data as data_room
from graft import verbs
from graft.data import DataSettings, nearest_ref, split_ref
from graft.errors import Problem, RecipeError, SettingsError, nearest
from graft.misfits import keys_of
from graft.recipe.ceilings import PLACE, Ceilings, ceilings
from graft.recipe.measures import Measures, check_formats, check_models, check_unseen, parts_of, read_measures
from graft.recipe.order import ordered
from graft.recipe.problems import Problems, Where
from graft.recipe.sections import Node, Outline, Recipe, readable
from graft.recipe.splits import check_splits
from graft.recipe.tasks import Sets, check_tasks
from graft.settings import Settings, parse, references
from graft.verb import Facts, Verb
from graft.yaml_lines import Document, read_text, read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def read_recipe(path: Path | str) -> Recipe:
    """The recipe in a YAML file. Raises RecipeError with all problems, RequestError where there is no such file."""
    path = Path(path)
    text = read_text(path, "a recipe (a YAML file)")
    return build_recipe(read_yaml(text), path.resolve().parent, text=text)


def build_recipe(
    document: Document, root: Path, *, text: str = "", outside: Mapping[str, Path] | None = None
) -> Recipe:
    """The recipe that `document` says, checked. Raises RecipeError with all problems."""
    reader = _Reader(document, root, outside)
    recipe = reader.read(text)
    if reader.problems.found or recipe is None:
        located = {str(p): p for p in map(document.located, reader.problems.found)}
        raise RecipeError(sorted(located.values(), key=lambda p: p.line or 0))
    return recipe


class _Reader:
    """Walks a document once; what is wrong is noted, and what rests on it is left out."""

    def __init__(self, document: Document, root: Path, outside: Mapping[str, Path] | None):
        self.document, self.root, self.outside = document, root, dict(outside or {})
        self.alone = outside is not None
        """Whether this is one node of a command, whose data sets go by the names of files."""
        self.problems = Problems(document.problems)
        self.unsure: set[str] = set()
        """Nodes of which only a part can be read: what they name is looked for, but they are judged no further."""
        self.ceilings = Ceilings({}, {})

    def read(self, text: str) -> Recipe | None:
        outline = self._outline()
        if outline is None:
            return None
        sets = {name: s for name, raw in outline.data.items() if (s := self._data(name, raw)) is not None}
        nodes = {name: n for name, raw in outline.models.items() if (n := self._node(name, raw, outline.seed))}
        measures, unsure = read_measures(outline.evaluate, self.problems)
        self._names(outline, sets, nodes, measures)
        self.ceilings = ceilings(outline, nodes, self.problems)
        nodes, measures = {**nodes, **self.ceilings.nodes}, self.ceilings.beside(measures)
        measures = {place: measure for place, measure in measures.items() if place not in unsure}
        formats = check_formats(sets, nodes, measures, self.root, self.problems)
        check_splits(sets, nodes, measures, formats, self.root, self.problems)
        tasks = check_tasks(measures, Sets(outline.data, sets, formats, self.root), self.problems)
        check_unseen(sets, nodes, measures, self.problems)
        data_order = ordered("data", {name: parts_of(settings) for name, settings in sets.items()}, self.problems)
        order = ordered("models", {name: node.models for name, node in nodes.items()}, self.problems)
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
        facts = self._combinations(recipe, formats)
        sound = facts.keys() & nodes.keys() - self.problems.of("models")
        check_models(measures, tasks, {name: facts[name] for name in nodes if name in sound}, self.problems)
        return recipe

    def _outline(self) -> Outline | None:
        raw = self.document.value
        if not isinstance(raw, dict):
            if not self.problems.found:
                found = {type(None): "nothing", list: "a list", str: f"the text {str(raw)[:60]!r}"}
                what = found.get(type(raw), f"{raw!r}")
                self.problems.note((), f"expected the sections {', '.join(keys_of(Outline))}, found {what}")
            return None
        # an empty section is one that is not there
        given = {key: value for key, value in raw.items() if value is not None}
        outline = self.problems.attempt((), lambda: parse(Outline, given)) or readable(given)
        for section, names in (("data", outline.data), ("models", outline.models), ("family", [outline.family])):
            for name in names:
                if not NAME.fullmatch(name) and not (self.alone and section == "data"):
                    place = (section, name) if section != "family" else (section,)
                    self.problems.note(place, f"expected a name of letters, digits, - and _, found {name!r}")
        return outline

    def _data(self, name: str, raw: Any) -> DataSettings | None:
        settings, _ = self.problems.salvage(("data", name), lambda raw: data_room.parse(raw, ("data", name)), raw)
        if settings is not None:
            for message in data_room.problems(settings, self.root):
                self.problems.note(("data", name), message)
        return settings

    def _node(self, name: str, raw: Any, seed: int) -> Node | None:
        path: Where = ("models", name)
        if not isinstance(raw, dict) or len(verbs_named := [key for key in raw if key != "seed"]) != 1:
            names = ", ".join(verbs.verb_names())
            self.problems.note(
                path, f"expected one verb with its settings ({names}), and `seed:` if wanted, found {raw!r}"
            )
            return None
        own_seed = raw.get("seed", seed)
        if not isinstance(own_seed, int) or isinstance(own_seed, bool) or own_seed < 0:
            self.problems.note((*path, "seed"), f"expected a whole number from 0, found {own_seed!r}")
            own_seed = seed
        (named,) = verbs_named
        path = (*path, named)
        verb, _ = self.problems.salvage(path, lambda named: verbs.verb(named[0]), [str(named)])
        if verb is None:
            return None
        settings, sure = self.problems.salvage(path, lambda raw: _parsed(verb, raw, path), raw[named])
        if settings is None:
            return None
        located = self.problems.attempt(path, lambda: verb.located(settings, self.root))
        if not sure or located is None:
            self.unsure.add(name)
        return Node(name, verb, located or settings, own_seed, self.document.line(path[:2]))

    def _names(
        self, outline: Outline, sets: Mapping[str, DataSettings], nodes: Mapping[str, Node], measures: Measures
    ) -> None:
        """Everything that is named must be there; what was written but did not parse has been reported already."""
        placed: list[tuple[Where, Settings]] = [(("data", name), settings) for name, settings in sets.items()]
        placed += [(("models", name, node.verb.name), node.settings) for name, node in nodes.items()]
        placed += [(("evaluate", place), measure) for place, measure in measures.items()]
        placed.append((("report",), outline.report))
        models = [*outline.models, *self.outside]
        for start, settings in placed:
            for kind, name, path in references(settings, start):
                known = split_ref(name)[0] in outline.data if kind == "data" else name in models
                if not known:
                    valid = list(outline.data) if kind == "data" else models
                    kind_words = "data set" if kind == "data" else "model"
                    there = ", ".join(sorted(valid)) or "none"
                    meant = nearest_ref(name, valid) if kind == "data" else nearest(name, valid)
                    self.problems.note(path, f"unknown {kind_words} {name!r}{meant}; there are: {there}")

    def _combinations(self, recipe: Recipe, formats: Mapping[str, str]) -> Mapping[str, Facts]:
        """Ask every verb whether its node can work, given the facts of what it is made from; the facts found."""
        from graft.facts import facts_of
        from graft.models import check_stored

        loaded = {model for node in recipe.models.values() if node.verb.loads for model in node.models}

        def looked_at(name: str, folder: Path) -> Facts:
            facts = facts_of(folder)
            if name in loaded:
                check_stored(folder)
            return facts

        found: dict[str, Facts] = {}
        for name, folder in recipe.outside.items():
            facts = self.problems.attempt(("models",), lambda: looked_at(name, folder))  # noqa: B023
            if facts is not None:
                found[name] = facts
        for name, node in recipe.models.items():
            if name in self.unsure or not all(model in found for model in node.models):
                continue
            path = ("models", name, node.verb.name)
            models = {model: found[model] for model in node.models}
            wrong = [*node.verb.unreadable(models), *(_unloadable(models) if node.verb.loads else ())] or [
                *(faults := node.verb.check(node.settings, models)),
                *([] if faults else node.verb.check_data(node.settings, models, formats)),
            ]
            for message in wrong:
                self._note(name, path, message)
            # a model that cannot be made has the facts it would have: what is made from it is judged all the same
            heard = Problems() if wrong else self.problems
            facts = heard.attempt(path, lambda: node.verb.facts(node.settings, models, name))  # noqa: B023
            if facts is not None:
                found[name] = replace(facts, tokenizer=None) if wrong else facts
        return found

    def _note(self, name: str, path: Where, message: str) -> None:
        """What is wrong with a node, or with the ensemble that a merge is to be measured beside."""
        merge = self.ceilings.merge_of(name)
        if merge is None:
            self.problems.note(path, message)
        else:
            words = "name the merges that have one: `ceiling: [NAME, …]`"
            self.problems.note(PLACE, f"there is no ensemble of the models of {merge}: {message}; {words}")


def _parsed(verb: Verb[Any], raw: Any, path: Where) -> Settings:
    """A verb's settings. A seed among them that the verb has no place for is told where seeds stand."""
    try:
        return verb.parse(raw, path)
    except SettingsError as error:
        raise SettingsError([_seed_beside(problem, path) for problem in error.problems]) from None


def _seed_beside(problem: Problem, path: Where) -> Problem:
    if problem.path != (*path, "seed") or not problem.message.startswith("unknown key"):
        return problem
    places = f"beside `{path[2]}` (`{path[1]}: {{{path[2]}: …, seed: …}}`) or at the top of the recipe"
    return Problem(problem.path, f"expected `seed` {places}, found it among the verb's settings")


def _unloadable(models: Mapping[str, Facts]) -> list[str]:
    """A sentence for each model without a manifest whose type `transformers` cannot make."""
    from graft.models import unknown_type

    strange = {name: f.config for name, f in models.items() if f.config and f.initialisation.startswith("unknown:")}
    return [f"{name} {said}" for name, config in strange.items() if (said := unknown_type(config))]
