"""Quality against cost: one dot a model, every dot named, the frontier drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from graft.report.colours import verb_class
from graft.report.judge import decimals
from graft.report.labels import SIZE, dot_box, place
from graft.report.read import Column, Run
from graft.report.svg import (
    Scale,
    element,
    fit,
    line,
    linear,
    log_ticks,
    logarithmic,
    padded,
    path,
    picture,
    text,
    text_width,
    ticks,
    title,
)
from graft.report.words import bytes_text, fixed, si

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, DOT = 332.0, 290.0, 52.0, 14.0, 14.0, 44.0, 5.5
FRAME = (LEFT, 0.0, WIDTH, HEIGHT - BOTTOM)


@dataclass(frozen=True)
class Cost:
    """What a model costs in one respect."""

    key: str
    words: str
    written: Callable[[float], str]
    less_is_better: bool


COSTS = (
    Cost("tokens_per_s", "tokens per second", si, False),
    Cost("peak_memory_bytes", "peak memory", bytes_text, True),
    Cost("disk_bytes", "bytes on disk", bytes_text, True),
)


@dataclass(frozen=True)
class Point:
    """A model in the picture: cost, score, and where that is in pixels."""

    model: str
    cost: float
    value: float
    x: float
    y: float


def cost_panel(run: Run, column: Column, cost: Cost) -> Markup:
    """The scores of a column against one cost, better always up; empty where fewer than two models have both."""
    found = [
        (str(row["model"]), run.costs[row["model"]][cost.key], float(row["value"]))
        for row in run.ranked(column)
        if cost.key in run.costs.get(row["model"], {})
    ]
    if len(found) < 2:
        return Markup("")
    (low, high), (cheap, dear) = _range([v for *_, v in found]), _log_range([c for _, c, _ in found])
    x = logarithmic(cheap, dear, LEFT, WIDTH - RIGHT)
    y = linear(low, high, *((HEIGHT - BOTTOM, TOP) if column.higher_is_better else (TOP, HEIGHT - BOTTOM)))
    points = [Point(name, c, v, x(c), y(v)) for name, c, v in found]
    best, places = frontier(points, column, cost), decimals(run, column)

    def hint(point: Point) -> str:
        return f"{point.model}: {fixed(point.value, places)} · {cost.words} {cost.written(point.cost)}"

    marks, steps = ticks(low, high, 5), _legible(log_ticks(cheap, dear), x, cost)
    grid = [line(LEFT, y(v), WIDTH - RIGHT, y(v), class_="grid") for v in marks.values]
    grid += [text(LEFT - 8, y(v) + 4, marks.label(v), class_="tick", text_anchor="end") for v in marks.values]
    grid += [text(x(v), HEIGHT - BOTTOM + 18, cost.written(v), class_="tick", text_anchor="middle") for v in steps]
    grid += [line(x(v), HEIGHT - BOTTOM, x(v), HEIGHT - BOTTOM + 4, class_="axis") for v in steps]
    grid.append(line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, class_="axis"))
    words = f"{cost.words} · {'less' if cost.less_is_better else 'more'} is better"
    grid.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, words, class_="quiet", text_anchor="middle"))
    return picture(
        WIDTH,
        HEIGHT,
        *grid,
        _steps(best),
        *_dots(run, points, best, hint),
        label=f"{column.title} against {cost.words}",
    )


def _legible(steps: Sequence[float], x: Scale, cost: Cost) -> list[float]:
    """The ticks whose numbers do not run into those before."""
    kept: list[float] = []
    for step in steps:
        room = x(step) - x(kept[-1]) if kept else WIDTH
        if room > text_width(cost.written(step), 11) + 10:
            kept.append(step)
    return kept


def _range(values: Sequence[float]) -> tuple[float, float]:
    return padded(min(values), max(values), 0.12)


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    """At least a factor of two wide, so that equal costs stand above each other and noise does not look like a gap."""
    low, high = min(values), max(values)
    widen = max((high / low) ** 0.14, (2 / (high / low)) ** 0.5 if high / low < 2 else 1.0)
    return low / widen, high * widen


def frontier(points: Sequence[Point], column: Column, cost: Cost) -> list[Point]:
    """The models that no other beats in both score and cost, the cheapest first."""
    by_cost = sorted(points, key=lambda p: (p.cost if cost.less_is_better else -p.cost, column.rank(p.value)))
    kept: list[Point] = []
    for point in by_cost:
        if not kept or column.better(point.value, kept[-1].value):
            kept.append(point)
    return kept


def _steps(kept: Sequence[Point]) -> Markup:
    """A step line through the frontier."""
    corners = [(kept[0].x, kept[0].y)]
    for before, after in pairwise(kept):
        corners += [(after.x, before.y), (after.x, after.y)]
    return path(corners, class_="frontier") if len(kept) > 1 else Markup("")


def _dots(run: Run, points: Sequence[Point], best: Sequence[Point], hint: Callable[[Point], str]) -> list[Markup]:
    """Every dot; names first for the frontier, then for combinations, then for the rest while there is room."""
    taken = [dot_box(p.x, p.y, DOT) for p in points]
    drawn = []
    for point in sorted(points, key=lambda p: (p not in best, not run.models[p.model].combines)):
        label = place(fit(point.model, SIZE, 120), point.x, point.y, taken, FRAME)
        named = label.draw(point.x, point.y) if label else Markup("")
        taken += [label.box] if label else []
        dot = element("circle", cx=point.x, cy=point.y, r=DOT, class_="dot")
        verb = verb_class(run.models[point.model].verb)
        drawn.append(element("g", title(hint(point)), named, dot, class_=verb))
    return drawn
