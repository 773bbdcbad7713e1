"""What tuning_help.py shows: scores over seeds and items with their intervals, tables, quality against parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from markupsafe import Markup

from _help import Difference
from graft.evaluate import metrics, statistics
from graft.report.series import COLOURS
from graft.report.svg import element, line, linear, log_ticks, logarithmic, padded, path, picture, text, ticks, title
from graft.report.words import si

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 330.0, 300.0, 50.0, 12.0, 30.0, 44.0
KEYS = 235.0
"""Pixels of a name below the panels."""


class Seeds:
    """A score of one method over several seeds, `statistics [seeds, items, k]`; intervals draw seeds and items anew.

    The same are drawn for all methods with as many of both, so that differences are paired.
    """

    def __init__(self, metric: metrics.Metric, statistics: np.ndarray):
        self.metric, self.statistics = metric, statistics

    @property
    def value(self) -> float:
        """Of all seeds together."""
        return float(self.metric.value(self.statistics.sum((0, 1))[None])[0])

    def drawn(self) -> np.ndarray:
        """[draws] the score of each resample."""
        seeds, items, _ = self.statistics.shape
        times = [_times(count, seed) for seed, count in enumerate((seeds, items))]
        return self.metric.value(np.einsum("ds,di,sik->dk", *times, self.statistics, optimize=True))

    def half(self) -> float:
        """The longer side of the 95 % interval."""
        low, high = np.nanquantile(self.drawn(), [0.025, 0.975])
        return float(max(self.value - low, high - self.value))

    def less(self, other: Seeds) -> Difference:
        """The difference from another method on the same items."""
        low, high, p = statistics.paired(self.drawn(), other.drawn(), self.statistics.shape[1])
        return Difference(self.value - other.value, low, high, p)


def _times(count: int, seed: int) -> np.ndarray:
    """[draws, count] how often each of so many things is drawn."""
    return (
        np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=statistics.DRAWS).astype(float)
    )


@dataclass(frozen=True)
class Cell:
    """A method at one size: parameters, the learning rates that were found (of a head beside it last), its score."""

    parameters: int
    rates: Sequence[float | None]
    scores: Seeds


Method = Mapping[float, Cell]
"""By the share of parameters that was wanted."""


def table(methods: Mapping[str, Method], shares: Sequence[float], whole: int) -> list[str]:
    """Markdown: a method a line, its score at each size; in brackets its parameters in percent, its learning rate, and
    the seeds where they are fewer than elsewhere. The best of a size in bold."""
    lines = [f"| method | {' | '.join(f'about {100 * share:g} %' for share in shares)} |"]
    lines.append("|---" * (len(shares) + 1) + "|")
    seeds = max(len(cell.scores.statistics) for found in methods.values() for cell in found.values())
    best = {share: _best([found[share] for found in methods.values() if share in found]) for share in shares}
    for name, found in methods.items():
        cells = [_cell(found[share], best[share], whole, seeds) if share in found else "" for share in shares]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _best(cells: Sequence[Cell]) -> Cell | None:
    higher = bool(cells) and cells[0].scores.metric.higher_is_better
    return (max if higher else min)(cells, key=lambda cell: cell.scores.value, default=None)


def _cell(cell: Cell, best: Cell | None, whole: int, seeds: int) -> str:
    value = f"{cell.scores.value:.3f}"
    value = f"**{value}**" if cell is best else value
    own = len(cell.scores.statistics)
    fewer = "" if own == seeds else f", {own} of {seeds} seeds"
    rates = "; ".join(f"{rate:g}" for rate in cell.rates if rate is not None)
    return f"{value} ± {cell.scores.half():.3f} ({100 * cell.parameters / whole:.2g} %, {rates}{fewer})"


def differences(
    methods: Mapping[str, Method], others: Mapping[str, Mapping[float, Seeds]], shares: Sequence[float]
) -> list[str]:
    """Markdown: the methods that have another one to be compared with, less it at each size."""
    lines = [f"| method | {' | '.join(f'about {100 * share:g} %' if share else 'all' for share in shares)} |"]
    lines.append("|---" * (len(shares) + 1) + "|")
    for name in (name for name in methods if others.get(name)):
        pairs = [(methods[name].get(share), others[name].get(share)) for share in shares]
        cells = [less(cell and cell.scores, other) for cell, other in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def less(one: Seeds | None, other: Seeds | None) -> str:
    """A paired difference; empty where one is missing, or they are of different seeds or items: a run in progress."""
    if one is None or other is None or one.statistics.shape != other.statistics.shape:
        return ""
    return str(one.less(other))


@dataclass(frozen=True)
class Panel:
    """A task in the picture: its heading, its methods, and lines across it (full tuning, no tuning)."""

    words: str
    methods: Mapping[str, Method]
    levels: Mapping[str, Seeds]

    @property
    def higher(self) -> bool:
        """Whether more is better; up is better in any case."""
        return next(iter(self.levels.values())).metric.higher_is_better


def drawing(panels: Sequence[Panel]) -> str:
    """Quality against parameters, a panel a task, as an SVG file of its own."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.methods))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    dashes = {name: None if place < len(COLOURS) else "5 3" for place, name in enumerate(names)}
    drawn = [
        element("g", *_panel(panel, colours, dashes), transform=f"translate({WIDTH * place} 0)")
        for place, panel in enumerate(panels)
    ]
    width = WIDTH * len(panels)
    across = max(1, int((width - LEFT) // KEYS))
    keys = [
        _key(name, LEFT + KEYS * (place % across), HEIGHT + 16 + 18 * (place // across), colours[name], dashes[name])
        for place, name in enumerate(names)
    ]
    height = HEIGHT + 18 * -(-len(names) // across) + 12
    head, rest = str(picture(width, height, *drawn, *keys, label="quality against trained parameters")).split(">", 1)
    css = resources.files("graft.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    style = f"<style>{css}svg {{ font-family: sans-serif; background: var(--paper); }}</style>"
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def _key(name: str, x: float, y: float, colour: str, dash: str | None) -> Markup:
    stroke = line(x, y - 4, x + 18, y - 4, stroke=colour, stroke_width=2.0, stroke_dasharray=dash)
    return element("g", stroke, text(x + 24, y, name, class_="key", style=f"fill:{colour}"))


def _panel(panel: Panel, colours: Mapping[str, str], dashes: Mapping[str, str | None]) -> list[Markup]:
    cells = [cell for found in panel.methods.values() for cell in found.values()]
    values = [cell.scores.value for cell in cells] + [level.value for level in panel.levels.values()]
    (low, high), costs = padded(min(values), max(values)), [cell.parameters for cell in cells]
    x = logarithmic(0.8 * min(costs), 1.25 * max(costs), LEFT, WIDTH - RIGHT)
    y = linear(low, high, *((HEIGHT - BOTTOM, TOP) if panel.higher else (TOP, HEIGHT - BOTTOM)))
    marks = ticks(low, high, 5)
    steps = log_ticks(0.8 * min(costs), 1.25 * max(costs))
    drawn = [text(LEFT, 16, panel.words, class_="quiet")]
    drawn += [line(LEFT, y(v), WIDTH - RIGHT, y(v), class_="grid") for v in marks.values]
    drawn += [text(LEFT - 8, y(v) + 4, marks.label(v), class_="tick", text_anchor="end") for v in marks.values]
    drawn += [text(x(v), HEIGHT - BOTTOM + 18, si(v), class_="tick", text_anchor="middle") for v in steps]
    drawn.append(line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, class_="axis"))
    words = "trained parameters"
    drawn.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, words, class_="quiet", text_anchor="middle"))
    for name, level in panel.levels.items():
        at = y(level.value)
        drawn.append(line(LEFT, at, WIDTH - RIGHT, at, stroke="#7c838b", stroke_dasharray="2 3"))
        drawn.append(text(LEFT + 4, at - 4, name, class_="tick"))
    for name, found in panel.methods.items():
        spots = sorted((x(cell.parameters), y(cell.scores.value)) for cell in found.values())
        told = ", ".join(f"{cell.parameters:,}: {cell.scores.value:.3f}" for cell in found.values())
        inside = colours[name] if dashes[name] is None else "var(--paper)"
        dots = [element("circle", cx=px, cy=py, r=3.0, fill=inside, stroke=colours[name]) for px, py in spots]
        curve = path(spots, stroke=colours[name], fill="none", stroke_width=1.6, stroke_dasharray=dashes[name])
        drawn.append(element("g", title(f"{name}: {told}"), *([curve] if len(spots) > 1 else []), *dots))
    return drawn
