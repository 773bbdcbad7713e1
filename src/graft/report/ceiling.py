"""Averaging against ensembling: what a merge of models gains beside what the ensemble of the same models gains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from graft.report.judge import decimals
from graft.report.labels import SIZE, dot_box, place
from graft.report.read import Column, Run
from graft.report.svg import Scale, element, fit, line, linear, padded, picture, text, ticks, title
from graft.report.words import fixed

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, DOT = 576.0, 400.0, 76.0, 16.0, 14.0, 46.0, 5.5


@dataclass(frozen=True)
class Twin:
    """A merge and an ensemble of the same models on one measure; gains over the best of those models, in percent."""

    column: Column
    merge: str
    ensemble: str
    parent: str
    merged: float
    together: float
    told: str


def twins(run: Run) -> Iterator[Twin]:
    """Every merge that has an ensemble of the same models, on every measure that all of them have."""
    ensembles = [model for model in run.models.values() if model.verb == "ensemble"]
    for merge in (model for model in run.models.values() if model.verb == "merge"):
        ours = set(merge.combined)
        for ensemble in (model for model in ensembles if set(model.parents) == ours):
            for column in run.columns:
                twin = _twin(run, column, merge.name, ensemble.name, sorted(ours))
                if twin is not None:
                    yield twin


def _twin(run: Run, column: Column, merge: str, ensemble: str, parents: list[str]) -> Twin | None:
    values = {row["model"]: float(row["value"]) for row in run.ranked(column)}
    if not {merge, ensemble, *parents} <= values.keys() or len(parents) < 2:
        return None
    sign = 1 if column.higher_is_better else -1
    best = max(parents, key=lambda name: sign * values[name])
    scale = abs(values[best]) or 1.0

    def gain(name: str) -> float:
        return 100 * sign * (values[name] - values[best]) / scale

    places = decimals(run, column)
    told = ", ".join(f"{name} {fixed(values[name], places)}" for name in (merge, ensemble, best))
    return Twin(column, merge, ensemble, best, gain(merge), gain(ensemble), f"{column.title}: {told} (best parent)")


def draw_ceiling(run: Run) -> Markup:
    """A dot a merge and measure, the ensemble's gain to the right, the merge's up; empty where there is no pair."""
    found = list(twins(run))
    if not found:
        return Markup("")
    ends = [0.0, *(twin.merged for twin in found), *(twin.together for twin in found)]
    low, high = padded(min(ends), max(ends), 0.08)
    x, y = linear(low, high, LEFT, WIDTH - RIGHT), linear(low, high, HEIGHT - BOTTOM, TOP)
    marks = ticks(low, high, 6)
    grid = [line(LEFT, y(v), WIDTH - RIGHT, y(v), class_="axis" if v == 0 else "grid") for v in marks.values]
    grid += [line(x(v), TOP, x(v), HEIGHT - BOTTOM, class_="axis" if v == 0 else "grid") for v in marks.values]
    grid += [text(LEFT - 8, y(v) + 4, f"{marks.label(v)} %", class_="tick", text_anchor="end") for v in marks.values]
    grid += [
        text(x(v), HEIGHT - BOTTOM + 18, f"{marks.label(v)} %", class_="tick", text_anchor="middle")
        for v in marks.values
    ]
    grid.append(line(x(low), y(low), x(high), y(high), class_="frontier"))
    words = "gain of the ensemble over the best parent"
    grid.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, words, class_="quiet", text_anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = {"class_": "quiet", "text_anchor": "middle", "transform": f"rotate(-90 12 {middle:g})"}
    grid.append(text(12, middle, "gain of the merge over the best parent", **turned))
    return picture(WIDTH, HEIGHT, *grid, *_dots(found, x, y), label="averaging against ensembling")


def _dots(found: list[Twin], x: Scale, y: Scale) -> list[Markup]:
    taken = [dot_box(x(twin.together), y(twin.merged), DOT) for twin in found]
    drawn = []
    for twin in found:
        at = x(twin.together), y(twin.merged)
        words = fit(f"{twin.merge}, {twin.column.place}", SIZE, 170)
        label = place(words, *at, taken, (LEFT, 0.0, WIDTH, HEIGHT - BOTTOM))
        named = label.draw(*at) if label else Markup("")
        taken += [label.box] if label else []
        dot = element("circle", cx=at[0], cy=at[1], r=DOT, class_="dot")
        drawn.append(element("g", title(twin.told), named, dot, class_="v-merge"))
    return drawn


def said(run: Run) -> str:
    """In words: how often the ensemble is ahead, and where averaging is worse than the best parent."""
    found = list(twins(run))
    if not found:
        return ""
    ahead = sum(twin.together > twin.merged for twin in found)
    hurts = sorted({f"{twin.merge} on {twin.column.place}" for twin in found if twin.merged < 0})
    words = f"The ensemble is ahead of the average in {ahead} of {len(found)} cases."
    return words + (f" Averaging is worse than the best parent: {', '.join(hurts)}." if hurts else "")
