"""Every named method at several sizes on one task, for tuning_help.py: learning rates searched, each training noted."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from _tuning_runs import Sample, Task, Tuned, kept, named, points_of, runs, sample, started, tuned
from _tuning_table import Cell, Method, Panel, Seeds, differences, less, table
from graft.adapters.point import Point
from graft.adapters.trial import trained
from graft.evaluate import metrics
from graft.evaluate.results import key_of
from graft.folders import read_config

SHARES = (0.001, 0.01, 0.05)
SEARCHED_AT = 0.01
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Learning rates; a search begins with three neighbours and goes on to a fourth where the best of them is at an end."""
FULL, HEAD, NONE = "full", "head alone", "untuned"


@dataclass(frozen=True)
class Tried:
    """A method of the grid: its options at a size, and the learning rate that a search begins at."""

    method: str
    options: Callable[[int], Mapping[str, Any]]
    rate: float
    sized: bool = True
    most: float = 0.05
    """Largest share of parameters that is tried."""

    def points(self, size: int) -> list[Point]:
        """At a size."""
        return points_of(self.method, self.options(size))


def width(size: int, **more: Any) -> dict[str, Any]:
    """Options of a bottleneck."""
    return {"width": size, **more}


SLOW = {"gate_rate": 1.0}
"""Gates that learn as fast as the rest."""
METHODS = {
    "lora": Tried("lora", lambda s: {"rank": s, "alpha": 2 * s, "on": ["query", "value"]}, 3e-3),
    "houlsby": Tried("houlsby", width, 3e-3),
    "pfeiffer": Tried("pfeiffer", width, 3e-3),
    "parallel_adapter": Tried("parallel_adapter", width, 3e-3),
    "scaled_parallel_adapter": Tried("scaled_parallel_adapter", width, 3e-3),
    "scaled_parallel_adapter, attention": Tried("scaled_parallel_adapter", lambda s: width(s, on=["attention"]), 3e-3),
    "mix_and_match": Tried("mix_and_match", lambda s: width(s, length=max(1, s // 4), **SLOW), 3e-3),
    "prefix": Tried("prefix", lambda s: {"length": s, **SLOW}, 3e-2),
    "prefix, gates ten times as fast": Tried("prefix", lambda s: {"length": s}, 1e-2),
    "prompt": Tried("prompt", lambda s: {"length": s, **SLOW}, 3e-2, most=0.01),
    "prompt, gates ten times as fast": Tried("prompt", lambda s: {"length": s}, 1e-2, most=0.01),
    "ia3": Tried("ia3", lambda s: {}, 3e-2, sized=False),
    "bitfit": Tried("bitfit", lambda s: {}, 1e-2, sized=False),
    "lora, feed-forward": Tried("lora", lambda s: {"rank": s, "alpha": 2 * s, "on": ["feed_forward"]}, 3e-3),
}


PAIRS = {
    "feed-forward less attention, scaled parallel adapter": (
        "scaled_parallel_adapter", "scaled_parallel_adapter, attention",
    ),
    "feed-forward less attention, LoRA": ("lora, feed-forward", "lora"),
    "parallel to the feed-forward less after it": ("parallel_adapter", "pfeiffer"),
    "scaled by 4 less not scaled, parallel adapter": ("scaled_parallel_adapter", "parallel_adapter"),
    "mix-and-match less scaled parallel adapter": ("mix_and_match", "scaled_parallel_adapter"),
}  # fmt: skip
"""What is claimed of methods: the first is better than the second."""


class Rates(NamedTuple):
    """Learning rates of the body, and of a fresh head beside it where it has one of its own."""

    body: float
    head: float | None = None


def climbed(score: Callable[[float], float], start: float, ladder: Sequence[float] = LADDER) -> float:
    """The best of three neighbours, and of a fourth where the best of them is at an end."""
    middle = ladder.index(start)
    places = range(max(0, middle - 1), min(len(ladder), middle + 2))
    best = max(places, key=lambda place: score(ladder[place]))
    fourth = 2 * best - middle
    if best != middle and 0 <= fourth < len(ladder):
        best = max((best, fourth), key=lambda place: score(ladder[place]))
    return ladder[best]


def walked(score: Callable[[float], float], start: float, way: int, ladder: Sequence[float] = LADDER) -> float:
    """From `start` on up or down (`way` 1 or -1) as long as that is better."""
    place = ladder.index(start)
    while 0 <= place + way < len(ladder) and score(ladder[place + way]) > score(ladder[place]):
        place += way
    return ladder[place]


class Grid:
    """Every method on one task from one model; each training is noted at once, none is done twice.

    `given.head_rate`: that of all fresh heads; None: each method's is searched, from where the head alone is best.
    `given.longer`: rates are searched from those on that are kept of the task's own number of steps.
    """

    def __init__(self, task: Task, base: Path, given: Namespace):
        self.task, self.base, self.given = task, base, given
        self.steps = given.steps or task.steps
        self.searching = range(given.search_seeds)
        self.config = read_config(base)
        self.whole = sum(p.numel() for p in started(base, None, 0)[0].parameters())
        counts = {"train": given.train, "dev": max(2, given.limit // 2), "test": given.limit}
        self.sample: Sample = sample(task, counts)
        name = f"{task.name}-{named(base)}-{self.steps}x{task.batch}-{given.train}-{given.limit}-{given.generate}"
        fixed = "" if given.head_rate is None or task.kind == "text" else f"-head{given.head_rate:g}"
        self.results = runs(f"{name}{fixed}")
        self.own = (NONE, FULL) if task.kind == "text" else (HEAD, FULL)
        self.sign = 1 if metrics.metric_of(task.metric).higher_is_better else -1

    def sizes(self, name: str) -> dict[float, int]:
        """The size of a method for each share of the parameters that it can have, by counting."""
        tried = METHODS[name]
        if self.count(name, 1) is None:
            return {}
        if not tried.sized:
            return {min(SHARES, key=lambda share: abs(np.log(share * self.whole / self.count(name, 1)))): 1}
        found = {share: self._size(name, share) for share in SHARES if share <= tried.most}
        near = {share: (self.count(name, size) or 0) / (share * self.whole) for share, size in found.items()}
        return {share: size for share, size in found.items() if 0.5 < near[share] < 2}

    def _size(self, name: str, share: float) -> int:
        """The size with parameters nearest to the share: they grow evenly with it, or nearly so. Smaller where the
        model has no place for as many."""
        first, ninth = self.count(name, 1), self.count(name, 9)
        assert first is not None
        assert ninth is not None
        wanted = share * self.whole
        guess = max(2, round(1 + 8 * (wanted - first) / (ninth - first)))
        while guess > 2 and self.count(name, guess) is None:
            guess = max(2, guess * 4 // 5)
        return min((guess - 1, guess, guess + 1), key=lambda size: abs((self.count(name, size) or np.inf) - wanted))

    @cache  # noqa: B019
    def count(self, name: str, size: int) -> int | None:
        """Parameters of a method at a size; None where the model has no place for it."""
        return trained(self.config, METHODS[name].points(size))

    def run(self, name: str, share: float | None, rates: Rates, seed: int) -> dict[str, Any]:
        """One training, or what was noted of it; `share` None: a method without adapters."""
        own = {} if rates.head is None or self.given.head_rate is not None else {"head_rate": rates.head}
        key = key_of(method=name, share=share, rate=rates.body, seed=seed, **own)
        return self.results.get(key) or self._new(key, name, share, rates, seed)

    def _new(self, key: str, name: str, share: float | None, rates: Rates, seed: int) -> dict[str, Any]:
        since = time.monotonic()
        done = self._train(name, share, rates, seed)
        dev = done.judge("dev")[self.task.metric]
        test = done.judge("test", self.given.generate)
        row = {
            "key": key, "method": name, "share": share, "rate": rates.body, "head_rate": rates.head, "seed": seed,
            "base": named(self.base), "trained": done.trained, "head": done.fresh,
            "dev": float(dev[0].value(dev[1].sum(0)[None])[0]),
            "test": {metric: statistics.round(6).tolist() for metric, (_, statistics) in test.items()},
            "seconds": time.monotonic() - since,
        }  # fmt: skip
        told = f"{self.task.name} {name} {share} {rates} {seed}: {row['dev']:.4f}, {row['seconds']:.1f} s"
        print(time.strftime("%H:%M:%S"), told, file=sys.stderr)
        return self.results.append(row)

    def _train(self, name: str, share: float | None, rates: Rates, seed: int) -> Tuned:
        points: list[Point] | None = [] if name in (HEAD, NONE) else None
        if name in METHODS:
            assert share is not None
            points = METHODS[name].points(self.sizes(name)[share])
        model, tokenizer = started(self.base, points, seed)
        steps = 0 if name == NONE else self.steps
        return tuned(model, tokenizer, self.sample, rate=rates.body, seed=seed, steps=steps, head_rate=rates.head)

    def _dev(self, name: str, share: float | None, rates: Rates) -> float:
        """The mean on the dev split over the seeds that are searched with; more is better."""
        return self.sign * float(np.mean([self.run(name, share, rates, seed)["dev"] for seed in self.searching]))

    def plan(self) -> Iterable[tuple[str, float | None]]:
        """(method, share) of every cell, those at which rates are searched first."""
        yield from ((name, None) for name in self.own)
        names = list(self.given.methods or METHODS)
        fitting = {name: self.sizes(name) for name in names}
        for share in (SEARCHED_AT, *(share for share in reversed(SHARES) if share != SEARCHED_AT)):
            yield from ((name, share) for name in names if share in fitting[name] and self._asked(name, share))

    def _asked(self, name: str, share: float) -> bool:
        """Whether a method is asked for at a share; a method of one size always."""
        return share in self.given.shares or not METHODS[name].sized

    def rates_of(self, name: str, share: float | None) -> Rates:
        """The rates of a method at a size: searched at the middle one; from there on lower for larger adapters, higher
        for smaller ones, as long as that is better on the dev split. The head keeps its rate of the middle size."""
        if self.given.longer and name != NONE:
            return self._onward(name, share)
        if name in (HEAD, NONE):
            return Rates(climbed(lambda rate: self._dev(name, None, Rates(rate)), 1e-2) if name == HEAD else 1e-3)
        sizes = self.sizes(name) if share is not None else {}
        middle = SEARCHED_AT if SEARCHED_AT in sizes else next(iter(sizes), None)
        rates = self._searched(name, middle, METHODS[name].rate if name in METHODS else 1e-3)
        if share is None or middle is None or share == middle:
            return rates
        way = -1 if share > middle else 1
        return rates._replace(
            body=walked(lambda rate: self._dev(name, share, Rates(rate, rates.head)), rates.body, way)
        )

    def _onward(self, name: str, share: float | None) -> Rates:
        """From the rates of the shorter training down or, if that is no better, up; the head keeps its own."""
        rows = [row for row in self.shorter if (row["method"], row["share"]) == (name, share)]
        if not rows:
            raise SystemExit(f"{self.task.name}: no training of {name} at {share} is kept; fill that grid and keep it")
        rates = self._found(rows, range(len({row["seed"] for row in rows})))

        def score(rate: float) -> float:
            return self._dev(name, share, Rates(rate, rates.head))

        lower = walked(score, rates.body, -1)
        return rates._replace(body=lower if lower != rates.body else walked(score, rates.body, 1))

    @cached_property
    def shorter(self) -> list[dict[str, Any]]:
        """The trainings from this model with the task's own number of steps that are kept."""
        return kept(f"{self.task.name}-{named(self.base)}-{self.task.steps}x{self.task.batch}")

    def _searched(self, name: str, share: float | None, start: float) -> Rates:
        """Of the body beside a head that learns as fast as it does best alone; at the best of them, of the head."""
        head = None if self.task.kind == "text" else self.given.head_rate or self.rates_of(HEAD, None).body
        body = climbed(lambda rate: self._dev(name, share, Rates(rate, head)), start)
        if head is None or self.given.head_rate is not None:
            return Rates(body, head)
        return Rates(body, climbed(lambda rate: self._dev(name, share, Rates(body, rate)), head))

    def fill(self) -> None:
        """The searches at the middle sizes, then all seeds at each size in turn."""
        cells = list(self.plan())
        for name, share in cells:
            if share in (None, SEARCHED_AT):
                self.rates_of(name, share)
        for name, share in cells:
            rates = self.rates_of(name, share)
            for seed in range(1 if name == NONE else self.given.seeds):
                self.run(name, share, rates, seed)

    def cells(self, metric: str, shorter: bool = False) -> dict[str, Method]:
        """What is there of each method, at the rates that were found for it; `shorter`: of the shorter trainings."""
        rows = [row for row in (self.shorter if shorter else self.results.rows) if metric in row["test"]]
        searching = range(len({row["seed"] for row in rows})) if shorter else self.searching
        found: dict[str, dict[float, Cell]] = {}
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name]
            for share in dict.fromkeys(row["share"] for row in own):
                at = self._found([row for row in own if row["share"] == share], searching)
                here = [row for row in own if row["share"] == share and rates_in(row) == at]
                statistics = np.array([row["test"][metric] for row in sorted(here, key=lambda row: row["seed"])])
                scores = Seeds(metrics.metric_of(metric, statistics.shape[-1]), statistics)
                told = at if self.given.head_rate is None else at[:1]
                found.setdefault(name, {})[share or 0.0] = Cell(here[0]["trained"], told, scores)
        return {name: found[name] for name in (NONE, HEAD, FULL, *METHODS) if name in found}

    def _found(self, rows: list[dict[str, Any]], searching: Sequence[int]) -> Rates:
        """The best rates in these rows of those that all seeds were tried at that are searched with; of equally good
        ones those that the search settled on, which have more seeds."""
        dev = {(rates_in(row), row["seed"]): row["dev"] for row in rows}
        wanted = [seed for seed in searching if any(row["seed"] == seed for row in rows)]
        tried = [rates for rates, seed in dev if seed == 0 and all((rates, other) in dev for other in wanted)]
        trained = Counter(rates for rates, _ in dev)
        return max(tried, key=lambda rates: (self.sign * sum(dev[rates, seed] for seed in wanted), trained[rates]))

    def scored(self, rows: Iterable[Mapping[str, Any]], rates: Rates) -> Seeds:
        """The scores at these rates on the seeds of the search."""
        tests = {row["seed"]: row["test"][self.task.metric] for row in rows if rates_in(row) == rates}
        statistics = np.array([tests[seed] for seed in self.searching])
        return Seeds(metrics.metric_of(self.task.metric, statistics.shape[-1]), statistics)

    def show(self) -> tuple[list[str], Panel | None]:
        """The tables, and the panel of the picture."""
        lines: list[str] = []
        panel = None
        for metric in dict.fromkeys(name for row in self.results.rows for name in row["test"]):
            methods = self.cells(metric)
            onward = self._gained(methods, metric) if self.given.longer else []
            levels = {name: methods.pop(name)[0.0].scores for name in (NONE, HEAD, FULL) if name in methods}
            said = "; ".join(f"{name} {own.value:.3f} ± {own.half():.3f}" for name, own in levels.items())
            lines += [f"**{self.task.name}**, {metric}, from {named(self.base)}: {said}.", ""]
            lines += [*table(methods, SHARES, self.whole), ""] if methods else []
            if metric == self.task.metric:
                for level in (name for name in (FULL, HEAD) if name in levels):
                    every = {name: dict.fromkeys(SHARES, levels[level]) for name in methods}
                    lines += [f"Less {level}:", "", *differences(methods, every, SHARES), ""]
                lines += [*compared(methods), "", *onward]
                panel = Panel(f"{self.task.name}, {metric.replace('_', ' ')}", methods, levels)
        return lines, panel

    def _gained(self, methods: Mapping[str, Method], metric: str) -> list[str]:
        """Markdown: what is there less itself and full tuning in the shorter trainings, where items are the same."""
        before, steps = self.cells(metric, shorter=True), f"with {self.task.steps} steps"
        lines = [f"| method | share | less itself {steps} | less {FULL} {steps} |", "|---|---|---|---|"]
        cells = [(name, *each) for name, own in methods.items() if name != NONE for each in own.items()]
        for name, share, cell in cells:
            others = [before.get(name, {}).get(share), before[FULL][0.0]]
            told = [less(cell.scores, other and other.scores) for other in others]
            if any(told):
                lines.append(f"| {name} | {100 * share or 100:g} % | {' | '.join(told)} |")
        return [*lines, ""]


def compared(methods: Mapping[str, Method]) -> list[str]:
    """Markdown: the pairs of which both are there."""
    pairs = {words: pair for words, pair in PAIRS.items() if all(name in methods for name in pair)}
    ones = {words: methods[one] for words, (one, _) in pairs.items()}
    others = {
        words: {share: cell.scores for share, cell in methods[other].items()} for words, (_, other) in pairs.items()
    }
    return differences(ones, others, SHARES) if pairs else []


def rates_in(row: Mapping[str, Any]) -> Rates:
    """The learning rates of a training."""
    return Rates(row["rate"], row.get("head_rate"))


def heads(grids: Sequence[Grid]) -> list[str]:
    """Markdown: on the test split and the seeds of the search, each method where its head learns at the rate found for
    it, less where it learns at the one that is best for the head alone; at the size where both were tried."""
    found = {grid.task.name: _own_heads(grid) for grid in grids if grid.task.kind != "text"}
    names = [name for name in (FULL, *METHODS) if any(name in own for own in found.values())]
    lines = [f"| method | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(own.get(name, '') for own in found.values())} |" for name in names]


def _own_heads(grid: Grid) -> dict[str, str]:
    """By method, the rate of its head and what that gains."""
    cells = grid.cells(grid.task.metric)
    alone = cells[HEAD][0.0].rates[0]
    told = {}
    for name, own in cells.items():
        share = next((share for share in (0.0, SEARCHED_AT, *SHARES) if share in own), None)
        if name == HEAD or share is None:
            continue
        body, head = own[share].rates
        rows = [row for row in grid.results.rows if (row["method"], row["share"] or 0.0) == (name, share)]
        both = [grid.scored(rows, Rates(body, rate)) for rate in (head, alone)]
        told[name] = f"{head:g}: {less(*both)}" if head != alone else f"{head:g}, as alone"
    return told
