"""Does tuning few weights help? Every named method at several sizes against full tuning, on tasks with real data.

    OMP_NUM_THREADS=4 python bench/family.py recipes/domains.yaml
    OMP_NUM_THREADS=1 python bench/tuning_help.py encoder
    OMP_NUM_THREADS=1 python bench/tuning_help.py grid
    OMP_NUM_THREADS=1 python bench/tuning_help.py domains
    OMP_NUM_THREADS=1 python bench/tuning_help.py tasks

`grid`: tagging (UD English EWT), classification (CLINC intents), generation (tldr commands), and where they are named
polarity, summaries (SciTLDR) and translation (Tatoeba), from small pretrained models: the decoder of the domains
family, or with `--on encoder` one that `encoder` pretrains by masked LM. The learning rate is searched for each method
at its middle size on the dev split with the first seed (`--search-seeds`: several), and from there on at its other
sizes. `domains`: AdapterFusion and MAD-X on named entities of five domains. `tasks`: a task alone,
with another one, and after it. Every part goes on where it was cut short; `show` prints the tables of the grid as far
as it is there and draws the picture. A larger run is other flags: `--steps`, `--train`, `--seeds`, `--limit`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import graft
from _help import source_line
from _tuning_domains import Domains, entities
from _tuning_runs import WORK, Sample, Task, Tuned, points_of, sample, started, tuned
from _tuning_several import several
from _tuning_table import Cell, Method, Panel, Seeds, differences, drawing, table
from _tuning_tasks import TASKS
from ensembling_help import family
from graft.adapters.point import Point
from graft.adapters.trial import trained
from graft.evaluate import metrics
from graft.evaluate.results import Results, key_of
from graft.folders import read_config

HERE = Path(__file__).resolve().parent
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


PAIRS = (("scaled_parallel_adapter", "scaled_parallel_adapter, attention"), ("lora, feed-forward", "lora"))
"""The same in the feed-forward and in attention."""


class Grid:
    """Every method on one task from one model; each training is noted at once, none is done twice."""

    def __init__(self, task: Task, base: Path, given: argparse.Namespace):
        self.task, self.base, self.given = task, base, given
        self.steps = given.steps or task.steps
        self.searching = range(given.search_seeds)
        self.config = read_config(base)
        self.whole = sum(p.numel() for p in started(base, None, 0)[0].parameters())
        counts = {"train": given.train, "dev": max(2, given.limit // 2), "test": given.limit}
        self.sample: Sample = sample(task, counts)
        name = f"{task.name}-{base.name}-{self.steps}x{task.batch}-{given.train}-{given.limit}-{given.generate}"
        self.results = Results(WORK / "runs" / name)

    def sizes(self, name: str) -> dict[float, int]:
        """The size of a method for each share of the parameters that it can have, by counting."""
        tried = METHODS[name]
        if self.count(name, 1) is None:
            return {}
        if not tried.sized:
            return {min(SHARES, key=lambda share: abs(np.log(share * self.whole / self.count(name, 1)))): 1}
        found = {share: self._size(name, share) for share in SHARES if share <= tried.most}
        near = {share: self.count(name, size) / (share * self.whole) for share, size in found.items()}
        return {share: size for share, size in found.items() if 0.5 < near[share] < 2}

    def _size(self, name: str, share: float) -> int:
        """The size with parameters nearest to the share: they grow evenly with it, or nearly so."""
        first, ninth = self.count(name, 1), self.count(name, 9)
        assert first is not None
        assert ninth is not None
        wanted = share * self.whole
        guess = max(2, round(1 + 8 * (wanted - first) / (ninth - first)))
        return min((guess - 1, guess, guess + 1), key=lambda size: abs((self.count(name, size) or np.inf) - wanted))

    @cache  # noqa: B019
    def count(self, name: str, size: int) -> int | None:
        """Parameters of a method at a size; None where the model has no place for it."""
        return trained(self.config, METHODS[name].points(size))

    def run(self, name: str, share: float | None, rate: float, seed: int) -> dict[str, Any]:
        """One training, or what was noted of it; `share` None: a method without adapters."""
        key = key_of(method=name, share=share, rate=rate, seed=seed)
        return self.results.get(key) or self._new(key, name, share, rate, seed)

    def _new(self, key: str, name: str, share: float | None, rate: float, seed: int) -> dict[str, Any]:
        since = time.monotonic()
        done = self._train(name, share, rate, seed)
        dev = done.judge("dev")[self.task.metric]
        test = done.judge("test", self.given.generate)
        row = {
            "key": key, "method": name, "share": share, "rate": rate, "seed": seed, "trained": done.trained,
            "head": done.fresh, "dev": float(dev[0].value(dev[1].sum(0)[None])[0]),
            "test": {metric: statistics.round(6).tolist() for metric, (_, statistics) in test.items()},
            "seconds": time.monotonic() - since,
        }  # fmt: skip
        print(
            f"{self.task.name} {name} {share} {rate:g} {seed}: {row['dev']:.4f}, {row['seconds']:.1f} s",
            file=sys.stderr,
        )
        return self.results.append(row)

    def _train(self, name: str, share: float | None, rate: float, seed: int) -> Tuned:
        points: list[Point] | None = [] if name in (HEAD, NONE) else None
        if name in METHODS:
            assert share is not None
            points = METHODS[name].points(self.sizes(name)[share])
        model, tokenizer = started(self.base, points, seed)
        steps = 0 if name == NONE else self.steps
        options = {"head_rate": None} if name == HEAD else {}
        return tuned(model, tokenizer, self.sample, rate=rate, seed=seed, steps=steps, **options)

    def searched(self, name: str, share: float | None, start: float) -> float:
        """The learning rate that is best on the dev split with the first seeds."""
        middle = LADDER.index(start)
        found = {place: self._dev(name, share, place) for place in (middle - 1, middle, middle + 1)}
        best = self._best(found)
        if best != middle and 0 <= 2 * best - middle < len(LADDER):
            found[2 * best - middle] = self._dev(name, share, 2 * best - middle)
        return LADDER[self._best(found)]

    def _dev(self, name: str, share: float | None, place: int) -> float:
        """The mean on the dev split over the seeds that are searched with."""
        return float(np.mean([self.run(name, share, LADDER[place], seed)["dev"] for seed in self.searching]))

    def _best(self, found: Mapping[int, float]) -> int:
        return (max if metrics.metric_of(self.task.metric).higher_is_better else min)(found, key=lambda at: found[at])

    def plan(self) -> Iterable[tuple[str, float | None, float]]:
        """(method, share, where its rates start) of every cell, those at which rates are searched first."""
        own = (NONE, FULL) if self.task.kind == "text" else (HEAD, FULL)
        yield from ((name, None, 1e-2 if name == HEAD else 1e-3) for name in own)
        names = list(self.given.methods or METHODS)
        fitting = {name: self.sizes(name) for name in names}
        for share in (SEARCHED_AT, *(share for share in reversed(SHARES) if share != SEARCHED_AT)):
            yield from ((name, share, METHODS[name].rate) for name in names if share in fitting[name])

    def rate_of(self, name: str, share: float | None, start: float) -> float:
        """The rate of a method at a size: searched at the middle one; from there on lower for larger adapters, higher
        for smaller ones, as long as that is better on the dev split."""
        if name == NONE:
            return start
        sizes = self.sizes(name) if share is not None else {}
        middle = SEARCHED_AT if SEARCHED_AT in sizes else next(iter(sizes), None)
        rate = self.searched(name, middle, start)
        if share is None or middle is None or share == middle:
            return rate
        place, way = LADDER.index(rate), -1 if share > middle else 1
        while 0 <= place + way < len(LADDER):
            here = {at: self._dev(name, share, at) for at in (place, place + way)}
            if self._best(here) == place:
                break
            place += way
        return LADDER[place]

    def fill(self) -> None:
        """The searches at the middle sizes, then all seeds at each size in turn."""
        cells = list(self.plan())
        for name, share, start in cells:
            if share in (None, SEARCHED_AT):
                self.rate_of(name, share, start)
        for name, share, start in cells:
            rate = self.rate_of(name, share, start)
            for seed in range(1 if name == NONE else self.given.seeds):
                self.run(name, share, rate, seed)

    def cells(self, metric: str) -> dict[str, Method]:
        """What is there of each method, at the rate that was found for it."""
        rows = [row for row in self.results.rows if metric in row["test"]]
        found: dict[str, dict[float, Cell]] = {}
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name]
            for share in dict.fromkeys(row["share"] for row in own):
                rate = self._found_rate([row for row in own if row["share"] == share])
                here = [row for row in own if row["share"] == share and row["rate"] == rate]
                statistics = np.array([row["test"][metric] for row in sorted(here, key=lambda row: row["seed"])])
                scores = Seeds(metrics.metric_of(metric, statistics.shape[-1]), statistics)
                found.setdefault(name, {})[share or 0.0] = Cell(here[0]["trained"], rate, scores)
        return {name: found[name] for name in (NONE, HEAD, FULL, *METHODS) if name in found}

    def _found_rate(self, rows: list[dict[str, Any]]) -> float:
        """The best rate in these rows of those that all seeds were tried at that are searched with."""
        dev = {(row["rate"], row["seed"]): row["dev"] for row in rows}
        wanted = [seed for seed in self.searching if any(row["seed"] == seed for row in rows)]
        tried = [rate for rate, seed in dev if seed == 0 and all((rate, other) in dev for other in wanted)]
        higher = metrics.metric_of(self.task.metric).higher_is_better
        return (max if higher else min)(tried, key=lambda rate: sum(dev[rate, seed] for seed in wanted))

    def show(self) -> tuple[list[str], Panel | None]:
        """The tables, and the panel of the picture."""
        lines: list[str] = []
        panel = None
        for metric in dict.fromkeys(name for row in self.results.rows for name in row["test"]):
            methods = self.cells(metric)
            others = {
                one: {share: cell.scores for share, cell in methods.get(other, {}).items()} for one, other in PAIRS
            }
            levels = {name: methods.pop(name)[0.0].scores for name in (NONE, HEAD, FULL) if name in methods}
            said = "; ".join(f"{name} {own.value:.3f} ± {own.half():.3f}" for name, own in levels.items())
            lines += [f"**{self.task.name}**, {metric}: {said}.", ""]
            lines += [*table(methods, SHARES, self.whole), ""] if methods else []
            if metric == self.task.metric:
                full = {name: dict.fromkeys(SHARES, levels[FULL]) for name in methods} if FULL in levels else {}
                lines += [f"Less {FULL} tuning:", "", *differences(methods, full, SHARES), ""]
                if any(others.values()):
                    lines += ["In the feed-forward less in attention:", "", *differences(methods, others, SHARES), ""]
                panel = Panel(f"{self.task.name}, {metric.replace('_', ' ')}", methods, levels)
        return lines, panel


def pretrain_encoder(given: argparse.Namespace) -> list[str]:
    """An encoder by masked LM on the text of the domains family, in BERT's form, whose layers have biases."""
    node = {
        "data": "mixed", "architecture": "encoder", "positions": "learned", "size": "5M", "length": 128,
        "tokenizer": {"path": str(given.family / "models" / "base")}, "budget": given.budget, "batch_size": 8,
        "learning_rate": 1e-3, "evaluate_every": 200, "objective": {"kind": "masked", "share": 0.3},
    }  # fmt: skip
    recipe = {
        "family": "tuning_encoder", "seed": 0, "data": family()[0]["data"],
        "models": {"encoder": {"pretrain": node}}, "evaluate": [],
    }  # fmt: skip
    (WORK / "encoder.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    graft.run(WORK / "encoder.yaml", WORK / "encoder")
    return []


def body(given: argparse.Namespace) -> Path:
    """The model that heads are put on."""
    base = given.family / "models" / "base"
    return WORK / "encoder" / "models" / "encoder" if given.on == "encoder" else base


def base_of(task: Task, given: argparse.Namespace) -> Path:
    """The model that a task starts from."""
    return given.family / "models" / "base" if task.kind == "text" else body(given)


def grids(given: argparse.Namespace) -> list[Grid]:
    """Of the tasks that were asked for."""
    return [Grid(TASKS[name], base_of(TASKS[name], given), given) for name in given.tasks]


def show(given: argparse.Namespace) -> list[str]:
    """The tables of the grids; the picture is drawn into the work folder."""
    found = [grid.show() for grid in grids(given)]
    panels = [panel for _, panel in found if panel is not None]
    if panels:
        (WORK / f"tuning{'-encoder' * (given.on == 'encoder')}.svg").write_text(drawing(panels))
    return [line for lines, _ in found for line in lines]


def fill(given: argparse.Namespace) -> list[str]:
    """The grids, and their tables."""
    for grid in grids(given):
        grid.fill()
    return show(given)


def domains(given: argparse.Namespace) -> list[str]:
    """AdapterFusion and MAD-X."""
    found = Domains(body(given), given)
    found.fill()
    return found.show()


def tasks(given: argparse.Namespace) -> list[str]:
    """A task alone, with another one, and after it."""
    counts = {"train": given.train, "dev": max(2, given.limit // 2), "test": given.limit}
    return several(body(given), sample(entities("music"), counts), sample(TASKS["tagging"], counts), given)


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "encoder": pretrain_encoder, "grid": fill, "domains": domains, "tasks": tasks, "show": show,
}  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--family", type=Path, default=HERE / "work" / "domains", help="folder of the domains family")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS)[:3], help="of the grid")
    parser.add_argument("--on", choices=["decoder", "encoder"], default="decoder", help="what heads are put on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="of the grid; all, if none is named")
    parser.add_argument("--steps", type=int, help="of each training; as many as the task has, if it is not said")
    parser.add_argument("--train", type=int, default=2000, help="records to train on, at most")
    parser.add_argument("--limit", type=int, default=200, help="records of test; half as many of dev")
    parser.add_argument("--generate", type=int, default=0, help="commands that are written out, of those")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search-seeds", type=int, default=1, help="of the search for learning rates")
    parser.add_argument("--budget", default="2M tokens", help="of the encoder's pretraining")
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print("\n".join([*PARTS[given.part](given), source_line()]))


if __name__ == "__main__":
    main()
