"""Verdicts: which model is best in a column, and whether a combination is better than the best of its parents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graft.report.read import Column, Row, Run, is_number
from graft.report.words import fixed

SIGNIFICANT_P = 0.05


@dataclass(frozen=True)
class Verdict:
    """A combination against the best of its parents in one column. `difference` is the combination minus the parent."""

    model: str
    parent: str
    difference: float
    worse: bool
    better: bool
    p: float | None
    """Of the paired test; None where the pair was not tested."""
    test: str
    """The paired test; empty where the pair was not compared."""

    @property
    def significant(self) -> bool:
        """Whether the paired test finds a difference at 5 %."""
        return self.p is not None and self.p < SIGNIFICANT_P

    @property
    def mark(self) -> str:
        """▼ worse, ▽ worse but within chance or untested, ▲ better, △ better but within chance or untested."""
        if self.worse:
            return "▼" if self.significant else "▽"
        if self.better:
            return "▲" if self.significant else "△"
        return ""

    @property
    def evidence(self) -> str:
        """`p < 0.001, paired bootstrap`, or why there is no p."""
        if self.p is None:
            return "too few items to test" if self.test else "the pair was not tested"
        return f"{p_text(self.p)}, {self.test}"


def p_text(p: float) -> str:
    """`p = 0.03`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def decimals(run: Run, column: Column) -> int:
    """How many decimals a column's scores deserve."""
    return places_for([h for row in run.ranked(column) if (h := half(row))])


def places_for(halves: Sequence[float]) -> int:
    """Decimals that show two digits of the middle one of these half intervals and one of the smallest, at most 6.

    3 where there are none, or none but 0.
    """
    wide = sorted(width for width in halves if width > 0)
    if not wide:
        return 3
    middle, least, places = wide[len(wide) // 2], wide[0], 0
    while places < 6 and (middle * 10**places < 9.5 or least * 10**places < 0.95):
        places += 1
    return places


def apart(a: float, b: float, places: int) -> int:
    """Decimals, `places` at least, with which two scores that differ are written differently; 8 at most."""
    while a != b and places < 8 and fixed(a, places) == fixed(b, places):
        places += 1
    return places


def half(row: Row) -> float | None:
    """How far the interval of a score or a difference reaches to its longer side, or None where there is none."""
    low, high, value = row.get("low"), row.get("high"), row.get("value", row.get("difference"))
    if not (is_number(low) and is_number(high) and is_number(value)):
        return None
    return max(high - value, value - low)


def best(run: Run, column: Column) -> list[str]:
    """The models with the best score in `column`: one, or all that are level."""
    rows = run.ranked(column)
    return [str(row["model"]) for row in rows if row["value"] == rows[0]["value"]]


def difference(run: Run, column: Column, a: str, b: str) -> tuple[Row, int] | None:
    """The comparison of `a` and `b` and the sign that makes its difference a minus b; None if there is none."""
    for compared, row in run.comparisons:
        if compared == column and set(row["models"]) == {a, b}:
            return row, 1 if list(row["models"]) == [a, b] else -1
    return None


def gap_places(run: Run, column: Column, a: str, b: str) -> int:
    """Decimals that the difference between two models deserves: by its own interval, where the pair was compared."""
    compared = difference(run, column, a, b)
    width = half(compared[0]) if compared else None
    return places_for([width]) if width else decimals(run, column)


def verdict(run: Run, model: str, column: Column) -> Verdict | None:
    """How `model` does against its best parent; None for a node that combines nothing or was not measured here."""
    own = run.row(model, column)
    node = run.models.get(model)
    if own is None or node is None or not node.combines:
        return None
    parents = [row for name in node.parents if (row := run.row(name, column)) is not None]
    if not parents:
        return None
    parent = min(parents, key=lambda row: column.rank(row["value"]))
    compared = difference(run, column, model, parent["model"])
    p = compared[0].get("p") if compared else None
    return Verdict(
        model=model,
        parent=str(parent["model"]),
        difference=own["value"] - parent["value"],
        worse=column.better(parent["value"], own["value"]),
        better=column.better(own["value"], parent["value"]),
        p=p if is_number(p) else None,
        test=str(compared[0].get("test") or "paired test").replace("_", " ") if compared else "",
    )


def verdicts(run: Run) -> Iterator[tuple[Column, Verdict]]:
    """Every combination's verdict in every column."""
    for column in run.columns:
        for name in run.models:
            found = verdict(run, name, column)
            if found is not None:
                yield column, found


def sentence(run: Run, column: Column, found: Verdict) -> str:
    """A verdict in words: `soup is worse than its best parent coder on x.test: 2.52 against 2.41 (+0.11, p …)`."""
    own, parent = run.scores[found.model, column]["value"], run.scores[found.parent, column]["value"]
    places = apart(own, parent, decimals(run, column))
    word = "worse than" if found.worse else "better than" if found.better else "equal to"
    return (
        f"{found.model} is {word} its best parent {found.parent} on {column.title}: "
        f"{fixed(own, places)} against {fixed(parent, places)} ({found.difference:+.2g}, {found.evidence})"
    )


def summarise(run: Run) -> dict[str, Any]:
    """The whole run as one JSON-ready value."""
    return {
        "family": run.family,
        "folder": str(run.folder),
        "models": [_model(run, name) for name in run.models],
        "comparisons": [dict(row) for _, row in run.comparisons],
        "problems": list(run.problems),
    }


def _model(run: Run, name: str) -> dict[str, Any]:
    model = run.models[name]
    return {
        "name": name,
        "verb": model.verb,
        "parents": list(model.parents),
        "made": model.made,
        "hash": model.manifest.get("hash"),
        "parameters": model.manifest.get("parameters"),
        "cost": run.costs.get(name, {}),
        "scores": [_score(run, name, column) for column in run.columns if run.row(name, column)],
    }


def _score(run: Run, name: str, column: Column) -> dict[str, Any]:
    row, found = run.scores[name, column], verdict(run, name, column)
    kept = ("measure", "task", "metric", "on", "unit", "value", "low", "high", "n", "higher_is_better")
    against = None
    if found is not None:
        against = {
            "best_parent": found.parent,
            "difference": found.difference,
            "worse": found.worse,
            "p": found.p,
            "significant": found.significant,
        }
    return {key: row.get(key) for key in kept} | {"best": name in best(run, column), "against_best_parent": against}
