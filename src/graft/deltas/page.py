"""The findings as tables for the terminal and as one page of pictures that opens offline."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from graft.deltas.advice import Advice
from graft.deltas.measure import Deltas
from graft.deltas.outcome import Outcome
from graft.report.svg import element, line, linear, padded, path, picture, text, ticks, title

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = ("#2b76c9", "#c8691a", "#0d8a6f", "#c0417f", "#7d52c4", "#8f7a08", "#b53b2e", "#55677d")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760.0, 240.0, 56.0, 150.0, 12.0, 40.0
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1d2125}"
    "h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse}td,th{padding:.15em .9em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.quiet{fill:#5d656e}text{font-size:12px}.grid{stroke:#e4e6e6}"
    "svg{max-width:100%;height:auto}"
)
Series = Mapping[str, Sequence[tuple[float, float]]]


def tables(found: Deltas, advice: Advice, seen: Outcome | None) -> Iterator[Table | str]:
    """What people read in the terminal."""
    from rich.table import Table

    moved = Table("model", "‖δ‖/‖θ₀‖", "largest fifth holds", *found.models, title="task vectors, and their cosines")
    for index, name in enumerate(found.models):
        cosines = ["–" if value is None else f"{value:.3f}" for value in found.whole.cosines[index]]
        moved.add_row(name, f"{found.whole.relative[index]:.4f}", f"{found.largest[index]:.0%}", *cosines)
    yield moved
    if found.whole.conflicts is not None:
        yield (
            f"signs contradict in {found.whole.conflicts:.0%} of the elements that two models or more changed "
            f"(independent changes of all elements: {found.by_chance:.0%})"
        )
    if seen is not None:
        scores = Table("model", seen.metric, title="on held-out data")
        for name, value in seen.scores.items():
            scores.add_row(name, "–" if value is None else f"{value:.4f}")
        yield scores
        for name, found_line in seen.lines.items():
            height = "not a number on the way" if found_line.barrier is None else f"{found_line.barrier:.4f}"
            yield f"barrier on the line {name}: {height}"
    options = "".join(f" --{key} {value}" for key, value in advice.settings.items())
    yield f"try first: {advice.method}{options}"
    yield from (f"  because {reason}" for reason in advice.why)
    if advice.also:
        yield f"  then: {', '.join(advice.also)}"


def page(found: Deltas, advice: Advice, seen: Outcome | None) -> str:
    """One HTML page without scripts."""
    kinds = [kind for kind in ("attention", "feed-forward", "norms", "other") if _by_layer(found, kind)]
    body = [f"<h1>What {html.escape(', '.join(found.models))} learned away from {html.escape(found.base)}</h1>"]
    body += [f"<p><b>Try first: {html.escape(advice.method)}</b> {html.escape(str(dict(advice.settings)))}</p><ul>"]
    body += [f"<li>{html.escape(reason)}</li>" for reason in advice.why] + ["</ul>"]
    for kind in kinds:
        body += [f"<h2>Length of the task vectors, {kind}, by layer</h2>", _plot(_by_layer(found, kind), "‖δ‖/‖θ₀‖")]
    conflicts = {kind: _conflicts(found, kind) for kind in kinds}
    if any(conflicts.values()):
        body += ["<h2>Contradicting signs, by layer</h2>", _plot(conflicts, "share of shared elements")]
    if len(found.models) > 1:
        body += ["<h2>Cosines between the task vectors</h2>", _cosines(found)]
    if seen is not None:
        body += _outcome(seen)
    inside = "".join(body)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Task vectors</title><style>{STYLE}</style>'
        f"{inside}</html>\n"
    )


def _conflicts(found: Deltas, kind: str) -> list[tuple[float, float]]:
    parts = [part for part in found.parts if part.kind == kind]
    return [(float(p.layer), p.conflicts) for p in parts if p.layer is not None and p.conflicts is not None]


def _by_layer(found: Deltas, kind: str) -> dict[str, list[tuple[float, float]]]:
    parts = [part for part in found.parts if part.kind == kind and part.layer is not None]
    if not parts:
        return {}
    return {n: [(float(p.layer or 0), p.relative[i]) for p in parts] for i, n in enumerate(found.models)}


def _plot(series: Series, words: str) -> Markup:
    """Lines over layers (or shares of a way), a colour a series, named at the right."""
    drawn = {name: points for name, points in series.items() if points}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    low, high = padded(min(ys), max(ys))
    x, y = linear(min(xs), max(xs) or 1.0, LEFT, WIDTH - RIGHT), linear(low, high, HEIGHT - BOTTOM, TOP)
    marks, steps = ticks(low, high, 4), ticks(min(xs), max(xs), 8)
    grid = [line(LEFT, y(v), WIDTH - RIGHT, y(v), class_="grid") for v in marks.values]
    grid += [text(LEFT - 8, y(v) + 4, marks.label(v), text_anchor="end", class_="quiet") for v in marks.values]
    grid += [text(x(v), HEIGHT - BOTTOM + 18, f"{v:g}", text_anchor="middle", class_="quiet") for v in steps.values]
    lines = []
    for index, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[index % len(COLOURS)]
        told = ", ".join(f"{px:g}: {py:.4g}" for px, py in points)
        spots = [(x(px), y(py)) for px, py in points]
        marks_at = [element("circle", cx=px, cy=py, r=3.0, fill=colour) for px, py in spots]
        lines.append(element("g", title(f"{name}: {told}"), _curve(spots, colour), *marks_at))
        lines.append(text(WIDTH - RIGHT + 10, TOP + 14 + 16 * index, name, fill=colour))
    return picture(WIDTH, HEIGHT, *grid, *lines, label=words)


def _curve(spots: Sequence[tuple[float, float]], colour: str) -> Markup:
    return path(spots, stroke=colour, fill="none", stroke_width=1.6) if any(pairwise(spots)) else Markup("")


def _cosines(found: Deltas) -> Markup:
    """A square a pair: blue where they point the same way, red where against each other."""
    size, side = 64.0, 120.0
    cells = []
    for row, name in enumerate(found.models):
        cells.append(text(side - 8, side + size * row + size / 2, name, text_anchor="end"))
        cells.append(text(side + size * row + size / 2, side - 10, name, text_anchor="middle"))
        for column in range(len(found.models)):
            value = found.whole.cosines[row][column]
            shade = 0.0 if value is None else abs(value)
            colour = "#b53b2e" if value is not None and value < 0 else "#2b76c9"
            x, y = side + size * column, side + size * row
            cells.append(element("rect", x=x, y=y, width=size - 2, height=size - 2, fill=colour, fill_opacity=shade))
            cells.append(
                text(x + size / 2, y + size / 2, "–" if value is None else f"{value:.2f}", text_anchor="middle")
            )
    whole = side + size * len(found.models) + 4
    return picture(whole, whole, *cells, label="cosines between task vectors")


def _outcome(seen: Outcome) -> list[str]:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{'–' if value is None else f'{value:.4f}'}</td></tr>"
        for name, value in seen.scores.items()
    )
    better = "higher" if seen.higher_is_better else "lower"
    found = [
        "<h2>On held-out data</h2>",
        f"<table><tr><th>model</th><th>{html.escape(seen.metric)} ({better} is better)</th></tr>{rows}</table>",
    ]
    lines = {
        f"{name} ({'–' if each.barrier is None else f'{each.barrier:.3f}'})": [
            (share, value) for share, value in zip(each.shares, each.values, strict=True) if value is not None
        ]
        for name, each in seen.lines.items()
    }
    if any(lines.values()):
        found += ["<h2>Along the straight lines between them (and the height of the barrier)</h2>"]
        found += [_plot(lines, f"{seen.metric} along the line")]
    return found
