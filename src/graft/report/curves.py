"""Training curves on one axis of tokens: a branch starts where its parent ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graft.report.colours import verb_class
from graft.report.labels import dot_box, place
from graft.report.read import Model, Row, Run, is_number
from graft.report.svg import element, fit, line, linear, padded, path, picture, spread, text, ticks, title
from graft.report.words import si

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, POINTS = 940.0, 340.0, 48.0, 150.0, 12.0, 44.0, 300

Spot = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A model's training: (tokens seen by it and its ancestors, loss) of the batches, their mean, and the dev set's."""

    model: Model
    loss: list[Spot]
    mean: list[Spot]
    dev: list[Spot]

    @property
    def end(self) -> Spot:
        """Where the mean ends."""
        return self.mean[-1]


def draw_curves(run: Run) -> Markup:
    """All training curves in one SVG, empty where nothing was trained."""
    curves = curves_of(run)
    if not curves:
        return Markup("")
    right = max(c.end[0] for c in curves)
    low, high = _loss_range(curves)
    x, y = linear(0, right, LEFT, WIDTH - RIGHT), linear(low, high, HEIGHT - BOTTOM, TOP)
    marks, steps = ticks(low, high, 6), ticks(0, right, 6)
    grid = [line(LEFT, y(v), WIDTH - RIGHT, y(v), class_="grid") for v in marks.values]
    grid += [text(LEFT - 8, y(v) + 4, marks.label(v), class_="tick", text_anchor="end") for v in marks.values]
    grid += [text(x(v), HEIGHT - BOTTOM + 18, si(v), class_="tick", text_anchor="middle") for v in steps.values]
    words = "tokens seen, ancestors' included"
    grid.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, words, class_="quiet", text_anchor="middle"))
    clip = element(
        "clipPath",
        element("rect", x=LEFT, y=TOP, width=WIDTH - LEFT - RIGHT + 6, height=HEIGHT - TOP - BOTTOM),
        id="plot",
    )
    lines = [
        element(
            "g",
            title(f"{c.model.name}: loss {c.end[1]:.3f} after {si(c.end[0])} tokens"),
            path([(x(t), y(v)) for t, v in c.loss], class_="batches"),
            path([(x(t), y(v)) for t, v in c.mean], class_="curve"),
            *(element("circle", cx=x(t), cy=y(v), r=3, class_="dev") for t, v in c.dev),
            class_=verb_class(c.model.verb),
            clip_path="url(#plot)",
        )
        for c in curves
    ]
    drawn = [(x(t), y(v)) for c in curves for t, v in c.loss + c.mean]
    labels = _labels(curves, [(x(c.end[0]), y(c.end[1])) for c in curves], drawn)
    return picture(WIDTH, HEIGHT, clip, *grid, *lines, *labels, label="training curves")


def _labels(curves: Sequence[Curve], ends: Sequence[Spot], lines: Sequence[Spot]) -> list[Markup]:
    """Names in the right margin, apart from each other; a curve that ends before it is named at its end."""
    margin = [i for i, (x, _) in enumerate(ends) if x > WIDTH - RIGHT - 60]
    placed = dict(zip(margin, spread([ends[i][1] for i in margin], 16, TOP + 6, HEIGHT - BOTTOM - 2), strict=True))
    taken = [dot_box(x, y, 2) for x, y in lines]
    drawn = []
    for index, (curve, (x, y)) in enumerate(zip(curves, ends, strict=True)):
        words = fit(f"{curve.model.name} {curve.end[1]:.2f}", 12.5, RIGHT - 24)
        if index in placed:
            edge, at = WIDTH - RIGHT + 22, placed[index]
            leader = path([(x, y), (edge - 12, at), (edge - 4, at)], class_="leader")
            named = leader + text(edge, at + 4, words, class_="label")
        else:
            label = place(words, x, y, taken, (LEFT, 0, WIDTH, HEIGHT - BOTTOM))
            taken += [label.box] if label else []
            named = label.draw(x, y) if label else Markup("")
        drawn.append(element("g", named, class_=verb_class(curve.model.verb)))
    return drawn


def curves_of(run: Run) -> list[Curve]:
    """The curves of all models with a training log, each moved right by what its trained ancestors had seen."""
    spans = {name: _span(model) for name, model in run.models.items()}
    found = []
    for model in run.models.values():
        start = _start(model.name, run.models, spans, frozenset())
        tokens = _tokens(model)
        loss = [(start + t, float(row["loss"])) for row, t in tokens if is_number(row.get("loss"))]
        dev = [(start + t, float(row["dev_loss"])) for row, t in tokens if is_number(row.get("dev_loss"))]
        if loss:
            found.append(Curve(model, _thinned(loss), _thinned(_moving_mean(loss)), dev))
    return found


def _tokens(model: Model) -> list[tuple[Row, float]]:
    """Each row of a log with the tokens seen until then; a row that does not say takes the last row's that does."""
    found, seen = [], 0.0
    for row in model.log:
        if is_number(row.get("tokens")):
            seen = float(row["tokens"])
        found.append((row, seen))
    return found


def _span(model: Model) -> float:
    return max((tokens for _, tokens in _tokens(model)), default=0.0)


def _start(name: str, models: Mapping[str, Model], spans: Mapping[str, float], above: frozenset[str]) -> float:
    """What the longest line of trained ancestors of a model had seen."""
    inner = above | {name}
    parents = [p for p in models[name].parents if p in models and p not in inner]
    return max((_start(p, models, spans, inner) + spans[p] for p in parents), default=0.0)


def _moving_mean(points: list[Spot]) -> list[Spot]:
    """Each loss as the mean of those around it, a twentieth of all at most."""
    reach = len(points) // 40
    found = []
    for index, (tokens, _) in enumerate(points):
        window = points[max(index - reach, 0) : index + reach + 1]
        found.append((tokens, sum(v for _, v in window) / len(window)))
    return found


def _thinned(points: list[Spot]) -> list[Spot]:
    """At most `POINTS` means over neighbours: what the eye can tell apart."""
    window = -(-len(points) // POINTS)
    groups = [points[i : i + window] for i in range(0, len(points), window)]
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]


def _loss_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the lowest loss to the highest, leaving out the fall at the start, which would flatten all that follows."""
    values = [v for c in curves for _, v in c.mean[len(c.mean) // 20 :] + c.dev]
    return padded(min(values), max(values), 0.04)
