"""The family drawn as a tree: ancestors left, descendants right, no line through a box.

Layers are longest paths from the roots; a line over several layers passes through a waypoint in each; the order in a
layer follows the mean of its neighbours' (Sugiyama, Tagawa and Toda 1981).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from graft.report.colours import verb_class
from graft.report.read import Model, Run
from graft.report.svg import element, fit, picture, rising, text, title
from graft.report.words import si

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, WAYPOINT, EDGE = 158.0, 46.0, 64.0, 16.0, 10.0, 8.0
Spot = tuple[str, int]
"""A model's name and the layer: the model itself in its own layer, a waypoint on the way to a child in later ones."""


def draw_tree(run: Run) -> Markup:
    """The family as one SVG, empty where there is no model."""
    if not run.models:
        return Markup("")
    layers = layers_of(run.models)
    chains = [chain for name in layers for chain in _chains(name, run.models, layers)]
    columns = _ordered(layers, chains)
    y = _heights(columns, layers, chains)
    width = max(layers.values()) * (BOX_WIDTH + GAP_X) + BOX_WIDTH + 2 * EDGE
    height = max(y[spot] + _size(spot, layers) for column in columns for spot in column) + EDGE
    lines = [_line(chain, y, layers, run.models) for chain in chains]
    boxes = [_box(run.models[name], _left(layer), y[name, layer]) for name, layer in layers.items()]
    return picture(width, height, *lines, *boxes, label=f"family tree of {run.family}")


def layers_of(models: Mapping[str, Model]) -> dict[str, int]:
    """Each model's layer: 0 for one without parents, else one more than the furthest parent's."""
    layers: dict[str, int] = {}

    def layer(name: str, above: frozenset[str]) -> int:
        if name not in layers:
            parents = [p for p in models[name].parents if p in models and p not in above | {name}]
            layers[name] = max((layer(p, above | {name}) + 1 for p in parents), default=0)
        return layers[name]

    for name in models:
        layer(name, frozenset())
    return layers


def _chains(name: str, models: Mapping[str, Model], layers: Mapping[str, int]) -> list[list[Spot]]:
    """For each parent of a model, the spots that the line from it passes."""
    return [
        [*((parent, layer) for layer in range(layers[parent], layers[name])), (name, layers[name])]
        for parent in dict.fromkeys(models[name].parents)
        if parent in layers and layers[parent] < layers[name]
    ]


def _ordered(layers: Mapping[str, int], chains: Sequence[Sequence[Spot]]) -> list[list[Spot]]:
    columns: list[list[Spot]] = [[] for _ in range(max(layers.values()) + 1)]
    for spot in dict.fromkeys([*layers.items(), *(s for chain in chains for s in chain)]):
        columns[spot[1]].append(spot)
    links = {(a, b) for chain in chains for a, b in pairwise(chain)}
    for sweep in range(6):
        forward = sweep % 2 == 0
        for index in range(1, len(columns)) if forward else range(len(columns) - 2, -1, -1):
            fixed = {spot: place for place, spot in enumerate(columns[index - 1 if forward else index + 1])}
            columns[index].sort(key=lambda spot, f=fixed, w=forward: _middle(spot, f, links, w))  # type: ignore[misc]
    return columns


def _middle(spot: Spot, fixed: Mapping[Spot, int], links: set[tuple[Spot, Spot]], forward: bool) -> float:
    near = [
        fixed[a if forward else b] for a, b in links if (b if forward else a) == spot and (a if forward else b) in fixed
    ]
    return sum(near) / len(near) if near else float(len(fixed)) / 2


def _heights(
    columns: Sequence[Sequence[Spot]], layers: Mapping[str, int], chains: Sequence[Sequence[Spot]]
) -> dict[Spot, float]:
    """The upper edge of every spot: apart within a column, and drawn towards its neighbours."""
    tall = max(sum(_size(s, layers) + GAP_Y for s in column) for column in columns) - GAP_Y
    centre: dict[Spot, float] = {}
    for column in columns:
        own = sum(_size(s, layers) + GAP_Y for s in column) - GAP_Y
        at = EDGE + (tall - own) / 2
        for spot in column:
            centre[spot] = at + _size(spot, layers) / 2
            at += _size(spot, layers) + GAP_Y
    links = [(a, b) for chain in chains for a, b in pairwise(chain)]
    for _ in range(8):
        for column in columns:
            wanted = [_pull(spot, centre, links) for spot in column]
            centre.update(zip(column, _apart(column, wanted, layers, EDGE, EDGE + tall), strict=True))
    return {spot: middle - _size(spot, layers) / 2 for spot, middle in centre.items()}


def _pull(spot: Spot, centre: Mapping[Spot, float], links: Sequence[tuple[Spot, Spot]]) -> float:
    near = [centre[b if a == spot else a] for a, b in links if spot in (a, b)]
    return sum(near) / len(near) if near else centre[spot]


def _apart(
    column: Sequence[Spot], wanted: Sequence[float], layers: Mapping[str, int], top: float, bottom: float
) -> list[float]:
    """Centres near `wanted` in the column's order, no two boxes overlapping."""
    sizes = [_size(spot, layers) for spot in column]
    offsets, total = [], 0.0
    for size in sizes:
        offsets.append(total + size / 2)
        total += size + GAP_Y
    slack = max(bottom - top - (total - GAP_Y), 0.0)
    # boxes do not overlap exactly where the centres less their offsets never fall
    lifted = rising([min(max(w - o - top, 0.0), slack) for w, o in zip(wanted, offsets, strict=True)])
    return [top + above + offset for above, offset in zip(lifted, offsets, strict=True)]


def _size(spot: Spot, layers: Mapping[str, int]) -> float:
    return BOX_HEIGHT if layers[spot[0]] == spot[1] else WAYPOINT


def _left(layer: int) -> float:
    return EDGE + layer * (BOX_WIDTH + GAP_X)


def _line(
    chain: Sequence[Spot], y: Mapping[Spot, float], layers: Mapping[str, int], models: Mapping[str, Model]
) -> Markup:
    """A smooth line from the parent's right side through its waypoints to the child's left side."""
    middle = [y[spot] + _size(spot, layers) / 2 for spot in chain]
    curve = ""
    for (before, at), (after, to) in pairwise(zip(chain, middle, strict=True)):
        start, end = _left(before[1]) + BOX_WIDTH, _left(after[1])
        bend = (start + end) / 2
        curve += (
            f"{'L' if curve else 'M'}{start:.1f} {at:.1f}C{bend:.1f} {at:.1f} {bend:.1f} {to:.1f} {end:.1f} {to:.1f}"
        )
    parent, child = chain[0][0], models[chain[-1][0]]
    weight, width = child.weight_of(parent), _line_width(child, parent)
    words = f"{parent} → {child.name}" + (f", weight {weight:.3g}" if weight is not None else "")
    return element("path", title(words), d=curve, class_=f"edge {verb_class(child.verb)}", stroke_width=width)


def _line_width(child: Model, parent: str) -> float:
    """From 0.8 to 4.5 pixels by the parent's share of the weights; 1.6 where no weights are known."""
    weights = [abs(w) for p in child.parents if (w := child.weight_of(p)) is not None]
    own, total = child.weight_of(parent), sum(weights)
    return 1.6 if own is None or not total else 0.8 + 3.7 * abs(own) / total


def _box(model: Model, x: float, y: float) -> Markup:
    words = f"{model.kind} · {si(model.manifest['parameters'])}" if model.manifest.get("parameters") else model.kind
    state = "" if model.made else " pending"
    hint = f"{model.name}: {model.kind}" + (f" of {', '.join(model.parents)}" if model.parents else "")
    return element(
        "g",
        title(hint if model.made else f"{hint} (not made yet)"),
        element("rect", x=x, y=y, width=BOX_WIDTH, height=BOX_HEIGHT, rx=8, class_="box"),
        element("rect", x=x, y=y + 9, width=3, height=BOX_HEIGHT - 18, rx=1.5, class_="mark"),
        text(x + 14, y + 20, fit(model.name, 13.5, BOX_WIDTH - 24), class_="name"),
        text(x + 14, y + 36, fit(words, 11, BOX_WIDTH - 24), class_="quiet"),
        class_=f"node {verb_class(model.verb)}{state}",
    )
