"""`report.html`: one file, no scripts, nothing fetched; light and dark; every number with where it came from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import graft
from graft.disk import atomic_write
from graft.report.ceiling import draw_ceiling, said
from graft.report.colours import VERBS, verb_class
from graft.report.cost import COSTS, cost_panel
from graft.report.curves import draw_curves
from graft.report.hills import hills
from graft.report.judge import (
    best,
    decimals,
    difference,
    gap_places,
    half,
    p_text,
    places_for,
    sentence,
    verdict,
    verdicts,
)
from graft.report.members import members
from graft.report.quantised import packings
from graft.report.read import Column, Model, Row, Run, is_number, measured_by
from graft.report.scores import difference_bar, difference_reach, flag_class, score_panel
from graft.report.speakers import speakers
from graft.report.tree import draw_tree
from graft.report.vectors import vectors
from graft.report.words import bytes_text, fixed, rate_text, seconds_text, si


def write_page(run: Run) -> Path:
    """Write `report.html` into the run's folder, all at once."""
    target = run.folder / "report.html"
    atomic_write(target, render_page(run))
    return target


def render_page(run: Run) -> str:
    """The whole page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("graft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("report.html.j2").render(
        run=run,
        css=resources.files("graft.report").joinpath("templates/report.css").read_text(encoding="utf-8"),
        verbs=_verbs(run),
        verb_class=verb_class,
        facts=_facts(run),
        cards=[_card(run, column) for column in run.columns],
        losses=[
            (found.mark, flag_class(found.mark), sentence(run, c, found)) for c, found in verdicts(run) if found.worse
        ],
        tree=draw_tree(run),
        panels=[(column, score_panel(run, column)) for column in run.columns],
        costs=[(c, drawn) for c in run.columns if (drawn := [p for cost in COSTS if (p := cost_panel(run, c, cost))])],
        ceiling=draw_ceiling(run),
        ceiling_said=said(run),
        vectors=vectors(run),
        hills=list(hills(run)),
        packings=list(packings(run)),
        curves=draw_curves(run),
        members=list(members(run)),
        speakers=list(speakers(run)),
        pairs=[(c, *_by_kinship(rows)) for c in run.columns if (rows := list(_pairs(run, c)))],
        table=[_line(run, model) for model in run.models.values()],
        provenance=[_provenance(run, model) for model in run.models.values()],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=graft.__version__,
    )


def _verbs(run: Run) -> list[str]:
    """The verbs that occur, in the order of a family's life."""
    used = {m.verb for m in run.models.values()}
    return [*(v for v in VERBS if v in used), *sorted(used - set(VERBS))]


def _facts(run: Run) -> list[tuple[str, str]]:
    """The figures under the title."""
    made = [m for m in run.models.values() if m.made]
    seconds = [s for m in made if is_number(s := m.manifest.get("seconds"))]
    facts = [(str(len(run.models)), "model" if len(run.models) == 1 else "models")]
    facts.append((str(len(run.scores)), "score" if len(run.scores) == 1 else "scores"))
    if run.comparisons:
        facts.append((str(len(run.comparisons)), "paired tests"))
    if seconds:
        facts.append((seconds_text(sum(seconds)), "to make the models"))
    return facts


def _card(run: Run, column: Column) -> dict[str, Any]:
    """What a column's winner is, and how it stands against the best model that is no combination."""
    row, places = run.ranked(column)[0], decimals(run, column)
    name = str(row["model"])
    single = next((r for r in run.ranked(column) if not run.models[r["model"]].combines), None)
    level = [model for model in best(run, column) if model != name]
    if level:
        against = f"level with {', '.join(level)}"
    elif run.models[name].combines and single:
        against = _against(run, column, name, single)
    else:
        against = _standing(run, column)
    return {
        "column": column,
        "model": name,
        "verb": run.models[name].verb,
        "value": fixed(row["value"], places),
        "half": f"±{fixed(error, places)}" if (error := half(row)) is not None else "",
        "against": against,
    }


def _against(run: Run, column: Column, name: str, single: Row) -> str:
    other = str(single["model"])
    places = gap_places(run, column, name, other)
    gap = run.scores[name, column]["value"] - single["value"]
    compared = difference(run, column, name, other)
    p = f", {p_text(compared[0]['p'])}" if compared and is_number(compared[0].get("p")) else ""
    return f"{fixed(gap, places, sign=True)} against {other}, the best single model{p}"


def _standing(run: Run, column: Column) -> str:
    combined = next((r for r in run.ranked(column) if run.models[r["model"]].combines), None)
    if combined is None:
        return f"best of {len(run.ranked(column))}"
    places = decimals(run, column)
    return f"a single model; the best combination is {combined['model']} with {fixed(combined['value'], places)}"


def _pairs(run: Run, column: Column) -> Iterator[dict[str, Any]]:
    """Paired comparisons of a column, the descendant first where one comes from the other."""
    rows = [row for c, row in run.comparisons if c == column]
    reach = difference_reach(rows)
    for row in rows:
        a, b = row["models"]
        if a in run.models[b].parents:
            a, b = b, a
        sign = 1 if [a, b] == list(row["models"]) else -1
        p, width = row.get("p"), half(row)
        places = places_for([width]) if width else decimals(run, column)
        yield {
            "a": a,
            "b": b,
            "kin": _kin(run, a, b),
            "difference": f"{fixed(row['difference'] * sign, places, sign=True)}",
            "half": f"±{fixed(width, places)}" if width is not None else "",
            "bar": difference_bar(row, sign, column, reach),
            "p": p_text(p).removeprefix("p ").removeprefix("= ") if is_number(p) else "–",
            "test": str(row.get("test") or "").replace("_", " "),
            "n": row.get("n", "–"),
        }


def _by_kinship(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pairs of which one is the other's parent, and the rest."""
    return [row for row in rows if row["kin"]], [row for row in rows if not row["kin"]]


def _kin(run: Run, a: str, b: str) -> bool:
    return a in run.models[b].parents or b in run.models[a].parents


def _line(run: Run, model: Model) -> dict[str, Any]:
    """A model's line of the table."""
    cost = run.costs.get(model.name, {})
    return {
        "model": model,
        "cells": [_cell(run, model.name, column) for column in run.columns],
        "cost": [
            rate_text(cost.get("tokens_per_s")),
            bytes_text(cost.get("peak_memory_bytes")),
            bytes_text(cost.get("disk_bytes")),
        ],
        "parameters": si(model.manifest["parameters"]) if is_number(model.manifest.get("parameters")) else "–",
    }


def _cell(run: Run, name: str, column: Column) -> dict[str, Any] | None:
    row = run.row(name, column)
    if row is None:
        return None
    places, found = decimals(run, column), verdict(run, name, column)
    mark = found.mark if found else ""
    return {
        "value": fixed(row["value"], places),
        "half": f"±{fixed(error, places)}" if (error := half(row)) is not None else "",
        "best": name in best(run, column),
        "mark": mark,
        "flag": flag_class(mark),
        "hint": sentence(run, column, found) if found else "",
    }


def _provenance(run: Run, model: Model) -> dict[str, Any]:
    """Where a model and its numbers came from, and the command that makes it again."""
    manifest = model.manifest
    shown = (
        "hash",
        "key",
        "seed",
        "verb_version",
        "created",
        "code",
        "versions",
        "data",
        "initialisation",
        "vocabulary",
    )
    facts = [(key, _written(manifest[key])) for key in shown if manifest.get(key) not in (None, "", [], {})]
    parents = manifest.get("parents") or []
    return {
        "model": model,
        "hash": str(manifest.get("hash") or ""),
        "facts": facts,
        "parents": [(str(p.get("name")), str(p.get("hash") or "")) for p in parents if isinstance(p, dict)],
        "settings": json.dumps(manifest.get("settings"), indent=2, ensure_ascii=False) if model.made else "",
        "metrics": _written(manifest.get("metrics") or {}),
        "seconds": seconds_text(s) if is_number(s := manifest.get("seconds")) else "–",
        "command": f"graft run recipe.yaml --only {shlex.quote(model.name)}",
        "rows": [_row(row) for (name, _), row in run.scores.items() if name == model.name],
    }


def _row(row: Row) -> dict[str, str]:
    """One score with all that is needed to get it again."""
    cost = row.get("cost") or {}
    return {
        "on": str(row.get("on") or row.get("task") or ""),
        "metric": str(row.get("metric") or row.get("measure") or ""),
        "value": f"{row['value']:.6g}",
        "interval": f"{row['low']:.6g} – {row['high']:.6g}" if half(row) is not None else "–",
        "n": str(row.get("n", "–")),
        "task_version": str(row.get("task_version", "–")),
        "seed": str(row.get("seed", "–")),
        "settings": _written(row.get("settings") or {}),
        "model_hash": str(row.get("model_hash") or "–"),
        "versions": _written({**(row.get("versions") or {}), "evaluation": measured_by(row) or "unknown"}),
        "items": str(row.get("items") or "–"),
        "seconds": seconds_text(s) if is_number(s := cost.get("seconds")) else "–",
        "time": str(row.get("time") or "–"),
    }


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
