"""The ensembles that merges are measured beside where a recipe asks for them: models that nobody had to write down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft import verbs
from graft.ensemble import EnsembleSettings
from graft.evaluate import Measure
from graft.merge import MergeSettings
from graft.recipe.measures import Measures
from graft.recipe.problems import Problems
from graft.recipe.sections import Node, Outline

PLACE = ("report", "ceiling")


@dataclass(frozen=True)
class Ceilings:
    """The nodes that are added, and for each merge that asks for one the ensemble that it is measured beside."""

    nodes: Mapping[str, Node]
    of: Mapping[str, str]

    def beside(self, measures: Measures) -> Measures:
        """The measures; one that is taken of some models is taken of their ensembles too."""
        return {place: self._beside(measure) for place, measure in measures.items()}

    def _beside(self, measure: Measure) -> Measure:
        if measure.models is None:
            return measure
        wanted = [*measure.models, *(self.of[name] for name in measure.models if name in self.of)]
        return measure.model_copy(update={"models": list(dict.fromkeys(wanted))})

    def merge_of(self, name: str) -> str | None:
        """The first merge that an ensemble was added for; None of other nodes."""
        return next((merge for merge, ceiling in self.of.items() if ceiling == name and name in self.nodes), None)


def ceilings(outline: Outline, nodes: Mapping[str, Node], problems: Problems) -> Ceilings:
    """One plain ensemble for all merges of the same models, none where one is written down; what is wrong is noted."""
    asked = outline.report.ceiling
    if asked is False:
        return Ceilings({}, {})
    merges = {name: node for name, node in nodes.items() if isinstance(node.settings, MergeSettings)}
    for name in asked if isinstance(asked, list) else []:
        if name in nodes and (name not in merges or len(_members(merges[name])) < 2):
            problems.note(PLACE, f"expected merges of two models or more, found {name}")
    wanted = [name for name in merges if asked is True or name in asked]
    there = {key: name for name, node in nodes.items() if (key := _plain_ensemble(node)) is not None}
    added: dict[str, Node] = {}
    of: dict[str, str] = {}
    for name in wanted:
        members = _members(merges[name])
        if len(members) < 2:
            continue
        own = frozenset(members)
        if own not in there:
            there[own] = f"{name}-ceiling"
            if there[own] in nodes:
                words = f"expected another name: this is that of the ensemble of {name}'s models (`report: ceiling`)"
                problems.note(("models", there[own]), words)
            verb = verbs.verb("ensemble")
            settings = verb.parse({"combine": "linear", "members": members})
            added[there[own]] = Node(there[own], verb, settings, outline.seed, merges[name].line)
        of[name] = there[own]
    return Ceilings(added, of)


def _members(merge: Node) -> list[str]:
    assert isinstance(merge.settings, MergeSettings)
    return merge.settings.names


def _plain_ensemble(node: Node) -> frozenset[str] | None:
    """The members of a mixture in which all weigh the same; None of any other node."""
    settings = node.settings
    if not isinstance(settings, EnsembleSettings) or settings.weights not in (None, "uniform"):
        return None
    if not isinstance(settings.members, list) or not all(isinstance(member, str) for member in settings.members):
        return None
    free: dict[str, Any] = {"members": [], "weights": None, "show": None, "self_contained": False}
    plain = node.verb.parse({"combine": "linear", "members": settings.names})
    return frozenset(settings.names) if settings.plain() | free == plain.plain() | free else None
