"""Lines over layers, or over shares of a way: a colour a series, each named at the right. And a square a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from graft.report.svg import element, fit, line, linear, padded, path, picture, text, text_width, ticks, title

COLOURS = ("#2b76c9", "#c8691a", "#0d8a6f", "#c0417f", "#7d52c4", "#8f7a08", "#b53b2e", "#55677d")
TOWARDS, AGAINST = COLOURS[0], COLOURS[6]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, SIZE = 560.0, 240.0, 56.0, 170.0, 12.0, 40.0, 12.5
SQUARE = 64.0
WIDEST = 320.0
"""Of a name at the right; a longer one is cut."""
DARK = 0.6
"""Shade of a square from which on its number is white."""

Series = Mapping[str, Sequence[tuple[float, float]]]


def plot(series: Series, words: str, *, across: str = "layer") -> Markup:
    """Lines through the points (x, y) of each series; one without points is left out. `words` is read out."""
    drawn = {name: points for name, points in series.items() if points}
    right = max(RIGHT, *(min(text_width(name, SIZE), WIDEST) + 14 for name in drawn))
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    low, high = padded(min(ys), max(ys))
    x, y = linear(min(xs), max(xs) or 1.0, LEFT, WIDTH - RIGHT), linear(low, high, HEIGHT - BOTTOM, TOP)
    marks, steps = ticks(low, high, 4), ticks(min(xs), max(xs), 8).values
    # there is no half a layer
    steps = [v for v in steps if across != "layer" or v == round(v)]
    grid = [line(LEFT, y(v), WIDTH - RIGHT, y(v), class_="grid") for v in marks.values]
    grid += [text(LEFT - 8, y(v) + 4, marks.label(v), text_anchor="end", class_="quiet") for v in marks.values]
    grid += [text(x(v), HEIGHT - BOTTOM + 18, f"{v:g}", text_anchor="middle", class_="quiet") for v in steps]
    grid.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, across, text_anchor="middle", class_="quiet"))
    lines = []
    for index, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[index % len(COLOURS)]
        told = ", ".join(f"{px:g}: {py:.4g}" for px, py in points)
        spots = [(x(px), y(py)) for px, py in points]
        dots = [element("circle", cx=px, cy=py, r=3.0, fill=colour) for px, py in spots]
        # a page's own rule for text is stronger than an attribute
        named = text(
            WIDTH - RIGHT + 10, TOP + 14 + 16 * index, fit(name, SIZE, right - 12), style=f"fill:{colour}", class_="key"
        )
        lines.append(element("g", title(f"{name}: {told}"), _curve(spots, colour), *dots, named))
    return picture(WIDTH - RIGHT + right, max(HEIGHT, TOP + 16.0 * len(drawn) + 8), *grid, *lines, label=words)


def _curve(spots: Sequence[tuple[float, float]], colour: str) -> Markup:
    return path(spots, stroke=colour, fill="none", stroke_width=1.6) if any(pairwise(spots)) else Markup("")


def cosines(names: Sequence[str], values: Sequence[Sequence[float | None]], words: str) -> Markup:
    """A square a pair, [names, names]: blue where they point the same way, red where against each other."""
    side = min(max(text_width(name, SIZE) for name in names), 160.0) + 16
    top = 24.0
    cells = []
    for row, name in enumerate(names):
        y = top + SQUARE * row
        cells.append(text(side - 8, y + SQUARE / 2, fit(name, SIZE, side - 12), text_anchor="end"))
        above = fit(name, SIZE, SQUARE - 4)
        cells.append(text(side + SQUARE * (row + 0.5), top - 10, above, text_anchor="middle"))
        for column, other in enumerate(names):
            value = values[row][column]
            shade = 0.0 if value is None else abs(value)
            x = side + SQUARE * column
            square = element(
                "rect", x=x, y=y, width=SQUARE - 2, height=SQUARE - 2,
                fill=AGAINST if value is not None and value < 0 else TOWARDS, fill_opacity=shade,
            )  # fmt: skip
            written = "–" if value is None else f"{value:.2f}"
            # a page's own rule for text is stronger than an attribute
            light = {"style": "fill:#fff"} if shade > DARK else {}
            number = text(x + SQUARE / 2, y + SQUARE / 2, written, text_anchor="middle", **light)
            cells.append(element("g", title(f"{name}, {other}: {written}"), square, number))
    return picture(side + SQUARE * len(names) + 4, top + SQUARE * len(names) + 4, *cells, label=words)
