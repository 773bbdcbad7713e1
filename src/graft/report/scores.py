"""Scores with their intervals: a panel for each column, best first, each value written out; and paired differences."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from graft.report.colours import verb_class
from graft.report.judge import best, decimals, gap_places, half, verdict
from graft.report.read import Column, Row, Run, is_number
from graft.report.svg import Scale, element, fit, line, linear, padded, picture, text, ticks, title
from graft.report.words import fixed

WIDTH, ROW, NAME, VALUE, TOP, BOTTOM = 480.0, 26.0, 118.0, 140.0, 6.0, 26.0


def score_panel(run: Run, column: Column) -> Markup:
    """One column: a line for each model with its interval, the value at the right, the best on a tinted band."""
    rows = run.ranked(column)
    height = TOP + ROW * len(rows) + BOTTOM
    low, high = padded(min(_end(r, "low") for r in rows), max(_end(r, "high") for r in rows), 0.04)
    x = linear(low, high, NAME + 8, WIDTH - VALUE)
    lines = [_score(run, column, row, x, TOP + ROW * (i + 0.5)) for i, row in enumerate(rows)]
    return picture(WIDTH, height, _axis(low, high, x, height), *lines, label=f"scores on {column.title}")


def _axis(low: float, high: float, x: Scale, height: float) -> Markup:
    marks = ticks(low, high, 4)
    parts = [line(x(v), TOP, x(v), height - BOTTOM, class_="grid") for v in marks.values]
    parts += [
        text(x(v), height - 9, marks.label(v), class_="tick", text_anchor="middle", font_size="11")
        for v in marks.values
    ]
    return Markup("").join(parts)


def _score(run: Run, column: Column, row: Row, x: Scale, y: float) -> Markup:
    name, value = str(row["model"]), row["value"]
    places, found = decimals(run, column), verdict(run, name, column)
    top, mark = name in best(run, column), found.mark if found else ""
    written = fixed(value, places) + (f" ±{fixed(error, places)}" if (error := half(row)) is not None else "")
    hint = f"{name}, {column.title}: {written} {row.get('unit') or ''}"
    if found and mark:
        gap = fixed(found.difference, gap_places(run, column, name, found.parent), sign=True)
        hint += f"; best parent {found.parent}, {gap} ({found.evidence})"
    band = element("rect", x=0, y=y - ROW / 2, width=WIDTH, height=ROW, rx=5, class_="band best" if top else "band")
    return element(
        "g",
        title(hint),
        band,
        text(NAME, y + 4, fit(name, 13, NAME - 6), text_anchor="end", class_="name" if top else "label"),
        line(x(_end(row, "low")), y, x(_end(row, "high")), y, class_="interval"),
        element("circle", cx=x(value), cy=y, r=4.5, class_="dot"),
        text(WIDTH - VALUE + 14, y + 4, written, class_="number strong" if top else "number"),
        text(WIDTH - 6, y + 4, mark, text_anchor="end", class_=f"flag {flag_class(mark)}"),
        class_=f"row {verb_class(run.models[name].verb)}",
    )


def flag_class(mark: str) -> str:
    """The CSS class of a verdict's mark."""
    return {"▼": "worse", "▽": "maybe-worse", "▲": "better", "△": "maybe-better"}.get(mark, "")


def _end(row: Row, key: str, otherwise: str = "value") -> float:
    """An end of the row's interval; the value itself where there is no interval."""
    end = row.get(key)
    return float(end if is_number(end) else row[otherwise])


def difference_reach(rows: Sequence[Row]) -> float:
    """The largest distance from zero that the intervals of these comparisons reach."""
    return (
        max((abs(v) for r in rows for v in (r.get("low"), r.get("high"), r["difference"]) if is_number(v)), default=1)
        or 1
    )


def difference_bar(row: Row, sign: int, column: Column, reach: float) -> Markup:
    """A paired difference and its interval beside zero; right of zero is better."""
    width, height = 220.0, 20.0
    direction = sign if column.higher_is_better else -sign
    x = linear(-reach, reach, 8, width - 8)
    low, high = _end(row, "low", "difference"), _end(row, "high", "difference")
    p = row.get("p")
    sure = is_number(p) and p < 0.05
    gained = row["difference"] * direction > 0
    return picture(
        width,
        height,
        line(x(0), 0, x(0), height, class_="zero"),
        line(x(low * direction), height / 2, x(high * direction), height / 2, class_="interval"),
        element("circle", cx=x(row["difference"] * direction), cy=height / 2, r=4.5, class_="dot"),
        label="difference with interval",
    ).replace("<svg", Markup('<svg class="{}"').format(("gain" if gained else "loss") if sure else "even"), 1)
