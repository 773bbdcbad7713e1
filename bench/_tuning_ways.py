"""What the parts of tuning_help.py share that go from one place to another: each way's score noted at once, tables."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from _tuning_grid import climbed
from _tuning_runs import Sample, Tuned, runs
from _tuning_table import Seeds, less
from graft.evaluate import metrics
from graft.evaluate.results import key_of

Move = tuple[str, str]
"""Where something was trained, and where it is tested."""


class Ways:
    """Scores by a metric of several ways, moves and seeds, in a folder of the runs; rates are searched from `starts` on
    with the first seeds."""

    starts: Mapping[str, float] = {}

    def __init__(self, folder: str, metric: str, given: Namespace):
        self.results = runs(folder)
        self.metric, self.seeds, self.searching = metric, given.seeds, range(given.search_seeds)

    def trial(self, kind: str, rate: float, seed: int) -> tuple[Tuned, Sample]:
        """A training of this kind, and the sample on whose dev split it is judged."""
        raise NotImplementedError

    @cache  # noqa: B019
    def rate(self, kind: str) -> float:
        """Of one kind of training."""
        return climbed(
            lambda rate: float(np.mean([self._dev(kind, rate, seed) for seed in self.searching])), self.starts[kind]
        )

    def _dev(self, kind: str, rate: float, seed: int) -> float:
        """Of one training of the search; more is better."""
        key = key_of(kind=kind, rate=rate, seed=seed)
        row = self.results.get(key) or self._tried(key, kind, rate, seed)
        higher = metrics.metric_of(row.get("metric", self.metric)).higher_is_better
        return float(row["dev"]) if higher else -float(row["dev"])

    def _tried(self, key: str, kind: str, rate: float, seed: int) -> dict[str, Any]:
        """Train, judge by the sample's first metric and note it."""
        done, tested = self.trial(kind, rate, seed)
        metric, statistics = next(iter(replace(done, sample=tested).judge("dev").values()))
        value = float(metric.value(statistics.sum(0)[None])[0])
        print(f"{time.strftime('%H:%M:%S')} {kind} at {rate:g}, {seed}: {value:.4f}", file=sys.stderr)
        row = {"key": key, "kind": kind, "rate": rate, "seed": seed, "dev": value, "metric": metric.name}
        return self.results.append(row)

    def rates_found(self) -> str:
        """The rates of the kinds that were searched, in words."""
        tried = [kind for kind in self.starts if any(row.get("kind") == kind for row in self.results.rows)]
        return f"Learning rates: {'; '.join(f'{kind} {self.rate(kind):g}' for kind in tried)}."

    def noted(self, name: str, move: Move, seed: int) -> Any:
        """What was noted, or None."""
        return self.results.get(key_of(name=name, source=move[0], target=move[1], seed=seed))

    def lacks(self, names: Sequence[str], moves: Sequence[Move], seed: int) -> bool:
        """Whether one of these ways on one of these moves was not noted."""
        return not all(self.noted(name, move, seed) for name in names for move in moves)

    def note(self, done: Tuned, name: str, move: Move, seed: int, tested: Sample) -> None:
        """The score on the test split of `tested`, whatever the model was trained on."""
        if self.noted(name, move, seed) is not None:
            return
        judged = replace(done, sample=replace(done.sample, records=tested.records)).judge("test")
        metric, statistics = judged[self.metric]
        value = float(metric.value(statistics.sum(0)[None])[0])
        print(f"{time.strftime('%H:%M:%S')} {name}, {' to '.join(move)}, {seed}: {value:.3f}", file=sys.stderr)
        self.results.append(
            {"key": key_of(name=name, source=move[0], target=move[1], seed=seed), "name": name, "source": move[0],
             "target": move[1], "seed": seed, "trained": done.trained, "test": statistics.tolist()}
        )  # fmt: skip

    def scores(self, name: str, moves: Sequence[Move]) -> Seeds | None:
        """Of one way over several moves: their items together; None where some are missing."""
        rows = {
            (r["source"], r["target"], r["seed"]): r["test"] for r in self.results.rows if r.get("name") == name
        }  # fmt: skip
        seeds = [seed for seed in range(self.seeds) if all((*move, seed) in rows for move in moves)]
        if not seeds:
            return None
        found = np.array([[item for move in moves for item in rows[(*move, seed)]] for seed in seeds])
        return Seeds(metrics.metric_of(self.metric), found)

    def table(self, names: Sequence[str], columns: Mapping[str, Sequence[Move]], *others: str) -> list[str]:
        """Markdown: a way a line; the last columns are less each of `others`, over the moves of the last of `columns`.

        Columns and differences that lack a training are empty."""
        heads = [f"{list(columns)[-1]}, less {other}" for other in others]
        lines = [f"| | {' | '.join([*columns, *heads])} |", "|---" * (len(columns) + len(heads) + 1) + "|"]
        for name in names:
            found = [self.scores(name, moves) for moves in columns.values()]
            cells = ["" if one is None else f"{one.value:.3f} ± {one.half():.3f}" for one in found]
            against = [self.scores(other, list(columns.values())[-1]) for other in others]
            cells += ["" if name == other else less(found[-1], one) for other, one in zip(others, against, strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines
