"""The order in which things can be made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from graft.recipe.problems import Problems


def ordered(section: str, graph: Mapping[str, Iterable[str]], problems: Problems) -> list[str]:
    """The names, each after what it is made from; as written where both would do. Notes every cycle."""
    known = {name: [p for p in parents if p in graph] for name, parents in graph.items()}
    try:
        return _stable_order(known)
    except CycleError as error:
        cycle = list(reversed(error.args[1]))
        start = min(range(len(cycle) - 1), key=lambda i: list(graph).index(cycle[i]))
        shown = [*cycle[start:-1], *cycle[:start], cycle[start]]
        problems.note((section, shown[0]), f"expected a tree, found a cycle: {' ← '.join(shown)}")
        return ordered(section, {name: parents for name, parents in graph.items() if name not in cycle}, problems)


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
