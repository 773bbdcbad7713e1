"""The plan of a run: every node with its key, whether it is there already, and what it will cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graft.checkpoint import ADAPTER, read_file_headers, read_headers
from graft.errors import CheckpointError, RequestError, UnknownName
from graft.lineage import MANIFEST, hash_model, read_manifest, touched
from graft.plan.keys import keys_of, recorded_parents, weights_hash
from graft.plan.places import Places
from graft.plan.preparing import with_preparation
from graft.recipe import Node, Recipe
from graft.verb import Estimate, Facts

State = Literal["cached", "resume", "run", "damaged"]


@dataclass(frozen=True)
class Step:
    """One node of a plan."""

    node: Node
    key: str
    facts: Facts
    estimate: Estimate
    state: State
    """`cached`: there already; `resume`: begun; `run`: to be made; `damaged`: there, but not as it was made."""
    why: str = ""
    """What is wrong where the state is `damaged`."""
    forced: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will do, in this order."""

    recipe: Recipe
    places: Places
    steps: Mapping[str, Step]

    def folder(self, name: str) -> Path:
        """Where a model lies (or will lie)."""
        return self.recipe.outside[name] if name in self.recipe.outside else self.places.model(name)

    @property
    def damaged(self) -> list[str]:
        """What is wrong with artifacts that were changed after they were made."""
        return [f"{name}: {step.why}" for name, step in self.steps.items() if step.state == "damaged"]


def make_plan(
    recipe: Recipe,
    places: Places,
    *,
    only: Collection[str] = (),
    force: Collection[str] = (),
    verify: bool = False,
) -> Plan:
    """The plan of a recipe. `only`: these nodes and what they need; `force`: made anew; `verify`: hash all weights.

    Raises UnknownName for a node that is not in the recipe, RequestError where `only` leaves out what `force` names.
    """
    for name in [*only, *force]:
        if name not in recipe.models:
            raise UnknownName("model", name, recipe.models)
    wanted = recipe.ancestors(only or recipe.models)
    if left := [name for name in force if name not in wanted]:
        raise RequestError(
            f"expected nodes to make anew, `force` (--force), only among those that {', '.join(only)} needs, as `only` "
            f"(--only) asks, found {', '.join(left)}"
        )
    recorded = {p: h for name in wanted for p, h in _recorded(places.model(name)).items()}
    keys = keys_of(recipe, recorded)
    facts = recipe.facts(keys.__getitem__)
    steps, prepared = {}, set[str]()
    for name in wanted:
        node = recipe.models[name]
        state: State = "run"
        why = ""
        if name not in force:
            state, why = _state(node, keys[name], places, verify)
        estimate = node.verb.estimate(node.settings, {m: facts[m] for m in node.models})
        if state != "cached":
            estimate = with_preparation(recipe, node, facts, estimate, prepared)
        steps[name] = Step(node, keys[name], facts[name], estimate, state, why, name in force)
    return Plan(recipe, places, steps)


def _state(node: Node, key: str, places: Places, verify: bool) -> tuple[State, str]:
    why = damage(places.model(node.name), verify=verify) if _holds(places.model(node.name), key) else None
    if why:
        return "damaged", f"{why}; `force=[{node.name!r}]` (--force {node.name}) makes it anew"
    if why == "":
        return "cached", ""
    return ("resume" if _begun(places.work(node.name), key) else "run"), ""


def _begun(work: Path, key: str) -> bool:
    """Whether a killed run left of this node what it can be gone on from: a state, or the whole that is to be moved."""
    mark = work / "key"
    if not mark.is_file() or mark.read_text() != key:
        return False
    return (work / "out" / MANIFEST).is_file() or any(path.is_file() for path in (work / "scratch").rglob("*"))


def standing(step: Step, plan: Plan) -> bool:
    """Whether a finished artifact still stands: it has the node's key, and its parents the weights it was made from."""
    folder = plan.places.model(step.node.name)
    if step.forced or not _holds(folder, step.key):
        return False
    recorded = recorded_parents(folder)
    return all(recorded.get(name) == weights_hash(plan.folder(name), recorded.get(name)) for name in step.node.models)


def _recorded(folder: Path) -> Mapping[str, str]:
    """`recorded_parents`; none where the manifest is damaged."""
    try:
        return recorded_parents(folder)
    except CheckpointError:
        return {}


def _holds(folder: Path, key: str) -> bool:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return manifest is not None and manifest.key == key


def damage(folder: Path, *, verify: bool) -> str:
    """What is wrong with an artifact, empty if nothing. Weights are hashed where a file was touched, or to `verify`."""
    manifest = read_manifest(folder)
    assert manifest is not None
    try:
        if (folder / ADAPTER).is_file():
            read_file_headers(folder / ADAPTER)
        elif list(folder.glob("*.safetensors")) or manifest.mergeable:
            read_headers(folder)
        if (verify or touched(folder, manifest)) and hash_model(folder) != manifest.hash:
            return "its weights are not those it was made with (by the hash in graft.json)"
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""
