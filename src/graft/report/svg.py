"""What every drawing needs: escaped elements, the width of text, scales, and ticks that read well."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from graft.report.words import si

Scale = Callable[[float], float]


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """`<tag …>children</tag>`, everything escaped; `stroke_width` is written `stroke-width`, None is left out."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _plain(value))
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), written, Markup("").join(escape(c) for c in children))


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def picture(width: float, height: float, *children: str, label: str) -> Markup:
    """An `<svg>` that keeps its shape and never grows beyond `width`; `label` is read out by screen readers."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        aria_label=label,
    )


def text(x: float, y: float, words: str, **attributes: object) -> Markup:
    """Words at a point."""
    return element("text", words, x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def path(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """A line through points."""
    return element("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), **attributes)


def title(words: str) -> Markup:
    """What a pointer that rests on the parent element is shown."""
    return element("title", words)


def text_width(words: str, size: float) -> float:
    """About how many pixels `words` take in a sans-serif of `size` pixels; never much less than they do."""
    return sum(_width(letter) for letter in words) * size


def _width(letter: str) -> float:
    if unicodedata.combining(letter):
        return 0.0
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.05
    if letter in "il.,:;|!'j ":
        return 0.32
    return 0.72 if letter.isupper() or letter in "mw@%" else 0.58


def fit(words: str, size: float, room: float) -> str:
    """`words`, or as much of their beginning as fits into `room` pixels with an ellipsis behind it."""
    if text_width(words, size) <= room:
        return words
    while words and text_width(words + "…", size) > room:
        words = words[:-1]
    return words.rstrip() + "…"


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """A scale from values [low, high] to pixels [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """The same in the logarithm; values are positive."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(value))


@dataclass(frozen=True)
class Ticks:
    """Where an axis is marked, and how many decimals its numbers need."""

    values: list[float]
    decimals: int

    def label(self, value: float) -> str:
        """A tick's number; `1.2M` from a hundred thousand on, where that still tells the ticks apart."""
        large = max(map(abs, self.values), default=0) >= 1e5
        short = large and len({si(v, 4) for v in self.values}) == len(self.values)
        return si(value, 4) if short else f"{value:.{self.decimals}f}"


def ticks(low: float, high: float, count: int = 5) -> Ticks:
    """About `count` round numbers (1, 2, 2.5, 5 × 10ⁿ apart) within [low, high]."""
    rough = max(high - low, 1e-12) / max(count, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    places = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if math.isclose(step / power, 2.5) else 0))
    first = math.ceil(low / step - 1e-9)
    values = [(first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1)]
    return Ticks(values, places)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]; powers alone over wide ranges, round steps over narrow."""
    steps = (1, 2, 5) if high / low < 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
    return found if len(found) > 2 else ticks(low, high, 5).values


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """The range made wider by `share` of itself on each side; a range of one point becomes one around it."""
    extra = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - extra, high + extra


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to `wanted` as can be that lie `gap` apart within [low, high], in the order given.

    Groups that would overlap are pushed apart around their middle; without room for all at `gap`, the gap shrinks.
    """
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    highest = high - (len(wanted) - 1) * gap
    starts = rising([min(max(wanted[i] - rank * gap, low), highest) for rank, i in enumerate(order)])
    placed = {i: start + rank * gap for rank, (i, start) in enumerate(zip(order, starts, strict=True))}
    return [placed[i] for i in range(len(wanted))]


def rising(values: Sequence[float]) -> list[float]:
    """The nearest values (least squares) that never fall: pool adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, size in blocks for _ in range(size)]
