"""What the parts of tuning_help.py share that go from one place to another: each way's score noted at once, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from _tuning_runs import Sample, Tuned, runs
from _tuning_table import Seeds, less
from graft.evaluate import metrics
from graft.evaluate.results import key_of

Move = tuple[str, str]
"""Where something was trained, and where it is tested."""


class Ways:
    """Scores by a metric of several ways, moves and seeds, in a folder of the runs."""

    def __init__(self, folder: str, metric: str, seeds: int):
        self.results = runs(folder)
        self.metric, self.seeds = metric, seeds

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
