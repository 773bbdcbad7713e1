"""What merging_help.py shows of its run: scores by domain, what of the experts is kept, averages beside ensembles."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping
from importlib import resources
from itertools import combinations
from typing import Any

import numpy as np

from _side_by_side import machine, versions
from graft.evaluate import statistics
from graft.evaluate.results import Results
from graft.report.ceiling import draw_ceiling
from graft.report.read import Run

EXPERTS = {"novelist": "novels", "doctor": "medical", "concierge": "dialogue", "coder": "code"}
DOMAINS = list(EXPERTS.values())
Scores = Mapping[str, np.ndarray]
"""By model `[domains, 1 + draws]` bits per byte: of all texts, then of texts drawn anew, the same for all models."""


def scores(run: Run) -> Scores:
    """Of every model that was measured on the mixture; texts are drawn anew within each domain."""
    results = Results(run.folder)
    found = {name: results.read_items(row) for (name, _), row in run.scores.items()}
    items = {name: np.split(one[1], len(DOMAINS)) for name, one in found.items() if one is not None}
    return dict(zip(items, np.stack(_drawn(list(items.values())), axis=1), strict=True))


def _drawn(items: list[list[np.ndarray]]) -> list[np.ndarray]:
    """A `[models, 1 + draws]` for each domain, from (bits, bytes) of each text."""
    made = []
    for of_domain in zip(*items, strict=True):
        value = [lambda counts, sums=sums: np.divide(*(counts @ sums).T) for sums in of_domain]
        whole = np.array([score(np.ones((1, len(of_domain[0])))) for score in value])
        made.append(np.concatenate([whole, statistics.redrawn(value, len(of_domain[0]), seed=0)], axis=1))
    return made


def kept(found: Scores, name: str) -> np.ndarray:
    """`[1 + draws]`: the mean over the domains of (base − model) / (base − that domain's expert)."""
    base = found["base"]
    gains = [base[d] - found[expert][d] for d, expert in enumerate(EXPERTS)]
    return np.mean([(base[d] - found[name][d]) / gain for d, gain in enumerate(gains)], axis=0)


def table(run: Run) -> list[str]:
    """Markdown lines of all models but the means and ensembles of some of the experts, the best first."""
    found = scores(run)
    heads = ["model", "λ", *DOMAINS, "all four", "all four − base", "kept"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    shown = [name for name in found if not name.startswith(("mean_", "ensemble_"))]
    for name in sorted(shown, key=lambda name: found[name][:, 0].mean()):
        mixed, against = found[name].mean(0), (found[name] - found["base"]).mean(0)
        cells = [name, scale(run, name), *(f"{half(one)}" for one in found[name]), half(mixed)]
        cells += ["", ""] if name == "base" else [between(against, "+.3f"), between(kept(found, name), ".2f")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def subsets(run: Run) -> list[str]:
    """Markdown lines: every pair and triple of experts, and all, averaged and ensembled, on text of all domains."""
    found = {name: one.mean(0) for name, one in scores(run).items()}
    lines = ["| experts | best of them | mean | ensemble | ensemble − mean |", "|---|---|---|---|---|"]
    for some in (some for size in (2, 3, 4) for some in combinations(EXPERTS, size)):
        ends = "_".join(some)
        mean, together = ("linear", "ensemble") if len(some) == len(EXPERTS) else (f"mean_{ends}", f"ensemble_{ends}")
        best = min(some, key=lambda name: found[name][0])
        values = [f"{found[name][0]:.3f}" for name in (mean, together)]
        gap = between(found[together] - found[mean], "+.3f")
        lines.append(f"| {', '.join(some)} | {best} {found[best][0]:.3f} | {' | '.join(values)} | {gap} |")
    return lines


def half(drawn: np.ndarray) -> str:
    """A score and half of its interval."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return f"{drawn[0]:.3f} ± {(high - low) / 2:.3f}"


def between(drawn: np.ndarray, form: str) -> str:
    """A value with its interval."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return f"{drawn[0]:{form}} ({low:{form}} to {high:{form}})"


def scale(run: Run, name: str) -> str:
    """The λ that a search found, where there was one."""
    notes: Any = run.models[name].manifest.get("notes") or {}
    searched = notes.get("search")
    return "" if searched is None else f"{searched['parameters'].get('scale', 1.0):.2f}"


def picture(run: Run) -> str:
    """The report's scatter of averages and ensembles as an SVG file of its own."""
    css = resources.files("graft.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    head, rest = str(draw_ceiling(run)).split(">", 1)
    style = f"<style>{css}svg {{ font-family: sans-serif; background: var(--paper); }}</style>"
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def ending(seconds: float) -> list[str]:
    """The command, its time, and what it ran on."""
    made = f"{versions(['graft', 'torch', 'transformers'])}; {datetime.date.today().isoformat()}."
    return [f"`{shlex.join(['python', *sys.argv])}`: {seconds / 60:.1f} minutes. {machine()}.", made]
