"""The family tree, of a recipe or read back from the manifests of folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.errors import RequestError

if TYPE_CHECKING:
    from rich.tree import Tree


@dataclass(frozen=True)
class Member:
    """One model of a family."""

    name: str
    verb: str
    parents: tuple[str, ...]
    parameters: int | None = None
    folder: str | None = None
    """Where it lies; None where it is not made yet."""


def family_of(place: Path | str) -> dict[str, Member]:
    """The family of a recipe (a file), a run's folder, or one model's folder with all its ancestors.

    Raises RequestError where there is none.
    """
    place = Path(place)
    if place.is_file():
        return _of_recipe(place)
    if (place / "graft.json").is_file():
        return dict(_ancestors(place))
    return _of_folder(place)


def _of_recipe(path: Path) -> dict[str, Member]:
    from graft.recipe import read_recipe

    recipe = read_recipe(path)
    facts = recipe.facts()
    return {
        name: Member(name, node.verb.name, node.models, facts[name].parameters) for name, node in recipe.models.items()
    }


def _of_folder(place: Path) -> dict[str, Member]:
    from graft.lineage import find_models

    found = find_models(place) if place.is_dir() else {}
    if not found:
        raise RequestError(f"expected a recipe, a run's folder or a model with graft.json, found none at {place}")
    return {name: _member(folder, manifest) for name, (folder, manifest) in found.items()}


def _ancestors(folder: Path) -> Iterator[tuple[str, Member]]:
    """A model and all that it was made from, the eldest first; parents that are gone are named all the same."""
    from graft.lineage import read_manifest

    manifest = read_manifest(folder)
    if manifest is None:
        yield folder.name, Member(folder.name, "load", (), folder=str(folder))
        return
    for parent in manifest.parents:
        where = (folder / parent.path).resolve()
        yield from _ancestors(where) if where.is_dir() else [(parent.name, Member(parent.name, "gone", ()))]
    yield manifest.name, _member(folder, manifest)


def _member(folder: Path, manifest: Any) -> Member:
    parents = tuple(parent.name for parent in manifest.parents)
    return Member(manifest.name, manifest.verb, parents, manifest.parameters, str(folder))


def plain(family: Mapping[str, Member]) -> list[dict[str, Any]]:
    """The family as JSON-ready values, parents as lists of names."""
    return [asdict(member) | {"parents": list(member.parents)} for member in family.values()]


def render(family: Mapping[str, Member], title: str) -> Tree:
    """The family as a rich tree. A model of several parents stands below the first; the others point to it."""
    from rich.tree import Tree

    tree = Tree(title)
    for name, member in family.items():
        if not any(parent in family for parent in member.parents):
            _grow(tree, name, family)
    return tree


def _grow(tree: Tree, name: str, family: Mapping[str, Member]) -> None:
    from graft.plan.table import count

    member = family[name]
    words = [f"[bold]{name}[/bold]", member.verb]
    if len(member.parents) > 1:
        words.append(f"of {', '.join(member.parents)}")
    if member.parameters:
        words.append(f"[dim]{count(member.parameters)}[/dim]")
    branch = tree.add(" · ".join(words))
    for child in family.values():
        known = [parent for parent in child.parents if parent in family]
        if known and known[0] == name:
            _grow(branch, child.name, family)
        elif name in known:
            branch.add(f"[dim]→ {child.name}[/dim]")
