"""What a recipe is made of: its sections as they are written, and the family that they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from graft.data import DataSettings
from graft.errors import SettingsError, closest
from graft.misfits import keys_of
from graft.settings import ModelRef, Settings, parse, references
from graft.verb import Facts, Verb


class Reported(Settings):
    """What the report of a run shows beside the scores."""

    deltas: Annotated[
        bool,
        Field(
            description="What the models of each merge learned away from their base: measured of a sample of every "
            "tensor when the report is written, once."
        ),
    ] = True
    ceiling: Annotated[
        bool | list[ModelRef],
        Field(
            description="Make and measure the ensemble of the same models, each with the same weight, for every merge, "
            "or for these: `[soup]`. Where a merge is measured, so is its ensemble, `soup-ceiling`; merges of the same "
            "models share one."
        ),
    ] = False


class Outline(Settings):
    """The sections of a recipe. `data`, `models` and `evaluate` are read by those whose they are."""

    family: Annotated[str, Field(description="Names the folder of the run, `runs/FAMILY`.")]
    seed: Annotated[int, Field(ge=0, description="Seed of everything random; a node may have its own.")] = 0
    data: Annotated[dict[str, Any], Field(description="Data sets by name.")] = {}
    models: Annotated[dict[str, Any], Field(min_length=1, description="Models by name.")]
    evaluate: Annotated[list[Any], Field(description="Measures, taken of every model.")] = []
    report: Annotated[Reported, Field(description="What the report shows beside the scores.")] = Reported()


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
        from graft.facts import facts_of

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


def readable(given: Mapping[str, Any]) -> Outline:
    """What can be read of sections that are not all right: so that the problems further down are told as well."""
    names = {key: key if key in keys_of(Outline) else closest(key, keys_of(Outline)) or key for key in given}
    filler: dict[str, Any] = {"family": "unnamed", "models": {"": None}}
    readable: dict[str, Any] = {"family": "unnamed", "models": {}}
    for key, name in names.items():
        try:
            readable[name] = getattr(parse(Outline, {**filler, name: given[key]}), name)
        except SettingsError:
            continue
    return Outline.model_construct(**readable)
