"""A task alone, with another one, and after it: a recipe over several seeds, for tuning_help.py.

All weights are trained. Each task is read as often as in the others: `single` reads the end task alone, `together` both
in mixed batches, `learned` the same with weights of the losses learned for the end task, `after` the other one first
(intermediate tuning).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import graft
from _tuning_runs import WORK, Sample, named
from _tuning_table import Seeds
from graft.evaluate import metrics
from graft.evaluate.results import Results

STEPS, BATCH, RATE = 40, 8, 1e-3
WAYS = ("single", "together", "learned", "after")
WORDS = {
    "single": "alone",
    "together": "both at once",
    "learned": "both at once, weights learned for entities",
    "after": "tags first, then entities",
    "other": "alone",
}


def several(base: Path, end: Sample, other: Sample, given: Namespace) -> list[str]:
    """Run the recipe and return its tables."""
    steps = given.steps or STEPS
    folder = WORK / f"several-{named(base)}-{steps}-{given.limit}-{given.seeds}"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {"end": end, "other": other}
    parts = {
        "family": "several", "seed": 0,
        "data": {name: source(one) for name, one in tasks.items()},
        "models": {"base": {"load": str(base)}, **nodes(steps, given.seeds)},
        "evaluate": measures(tasks, given.seeds),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(parts, sort_keys=False))
    graft.run(folder / "recipe.yaml", folder / "run")
    return [
        *table(folder / "run", "end.test", end.task.metric, WAYS, given.seeds), "",
        *table(folder / "run", "other.test", other.task.metric, ("other", "together", "learned"), given.seeds),
    ]  # fmt: skip


def source(one: Sample) -> dict[str, Any]:
    """A sample as a data set of a recipe."""
    return {"source": "jsonl", **{split: str(one.folder / f"{split}.jsonl") for split in one.records}}


def nodes(steps: int, seeds: int) -> dict[str, Any]:
    """A model for each way and seed."""
    end, other = ({name: {"data": name, "head": "tagging"}} for name in ("end", "other"))
    learn = {"learn": {"for": ["end"]}}
    made: dict[str, Any] = {}
    for seed in range(seeds):
        ways = {
            "single": tune("base", end, steps),
            "other": tune("base", other, steps),
            "together": tune("base", end | other, 2 * steps, mixing={"batches": "mixed"}),
            "learned": tune("base", end | other, 2 * steps, mixing={"batches": "mixed", **learn}),
            "after": tune(f"other_{seed}", end, steps),
        }
        made |= {f"{way}_{seed}": {"seed": seed, "tune": settings} for way, settings in ways.items()}
    return made


def tune(start: str, tasks: Mapping[str, Any], steps: int, **more: Any) -> dict[str, Any]:
    """Settings of one node."""
    return {
        "from": start, "tasks": dict(tasks), "budget": f"{steps} steps", "batch_size": BATCH, "learning_rate": RATE,
        "evaluate_every": steps, **more,
    }  # fmt: skip


def measures(tasks: Mapping[str, Sample], seeds: int) -> list[dict[str, Any]]:
    """Each task of the models that learned it."""
    having = {"end": WAYS, "other": ("other", "together", "learned")}
    return [
        {"measure": "tagging", "on": [f"{name}.test"], "metrics": [one.task.metric],
         "models": [f"{way}_{seed}" for way in having[name] for seed in range(seeds)]}
        for name, one in tasks.items()
    ]  # fmt: skip


def table(run: Path, on: str, metric: str, ways: Sequence[str], seeds: int) -> list[str]:
    """Markdown: a way a line, with its difference from the first."""
    results = Results(run)
    rows = {row["model"]: row for row in results.rows if row["kind"] == "score" and row["on"] == on}
    items = {name: found[1] for name, row in rows.items() if (found := results.read_items(row)) is not None}
    scores = {
        way: Seeds(metrics.metric_of(metric), np.array([items[f"{way}_{seed}"] for seed in range(seeds)]))
        for way in ways
    }
    lines = [f"| {on}, {metric} | | less alone |", "|---|---|---|"]
    for way, own in scores.items():
        less = "" if way == ways[0] else str(own.less(scores[ways[0]]))
        lines.append(f"| {WORDS[way]} | {own.value:.3f} ± {own.half():.3f} | {less} |")
    return lines
