"""A plan for people and for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft.data import misread
from graft.machine import size
from graft.plan.steps import Plan, Step

if TYPE_CHECKING:
    from rich.table import Table

STATES = {"cached": "there already", "resume": "goes on", "run": "to be made", "damaged": "damaged"}


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON-ready value."""
    return {
        "family": plan.recipe.family,
        "folder": str(plan.places.folder),
        "models": [_row(plan, step) for step in plan.steps.values()],
        "total": {"disk_bytes": _disk(plan), "seconds": _seconds(plan), "memory_bytes": _memory(plan)},
    }


def _row(plan: Plan, step: Step) -> dict[str, Any]:
    return {
        "name": step.node.name,
        "verb": step.node.verb.name,
        "from": list(step.node.models),
        "state": step.state,
        "why": step.why,
        "key": step.key,
        "folder": str(plan.folder(step.node.name)),
        "parameters": step.estimate.parameters,
        "disk_bytes": step.estimate.disk_bytes,
        "memory_bytes": step.estimate.memory_bytes,
        "seconds": step.estimate.seconds,
        "note": step.estimate.note,
        "memory": dict(step.estimate.parts),
    }


def render(plan: Plan) -> Table:
    """The plan as a rich table: a row for each node and the total of what is still to be made."""
    from rich.table import Table

    table = Table(title=f"{plan.recipe.family} · {plan.places.folder}", title_justify="left", show_footer=True)
    total = ("total to make", "", "", "", size(_disk(plan)), size(_memory(plan)), clock(_seconds(plan)))
    heads = ("model", "made by", "state", "parameters", "disk", "memory", "time")
    for head, foot in zip(heads, total, strict=True):
        table.add_column(head, footer=foot, justify="right" if head in heads[3:] else "left")
    for step in plan.steps.values():
        made_by = " ".join([step.node.verb.name, *(["of", ", ".join(step.node.models)] if step.node.models else [])])
        cost = step.estimate
        seconds = clock(cost.seconds) if _to_make(step) else "–"
        state = "forced" if step.forced else STATES[step.state]
        figures = (count(cost.parameters), size(cost.disk_bytes), size(cost.memory_bytes), seconds)
        table.add_row(step.node.name, made_by, state, *figures)
    table.caption, table.caption_justify = "\n".join([*_notes(plan), *_misread(plan)]), "left"
    return table


def render_memory(plan: Plan) -> Table | str:
    """What each training that is to be made holds in memory, as a rich table; a line where there is none."""
    from rich.table import Table

    trained = {name: step.estimate for name, step in plan.steps.items() if _to_make(step) and step.estimate.parts}
    if not trained:
        return "nothing is left to train: no training holds memory"
    kinds = list(dict.fromkeys(kind for cost in trained.values() for kind in cost.parts))
    table = Table(title="memory of each training, of one of its devices", title_justify="left")
    for head in ("model", *kinds, "at the peak"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for name, cost in trained.items():
        table.add_row(name, *(size(cost.parts[kind]) for kind in kinds), size(cost.memory_bytes))
    table.caption_justify = "left"
    table.caption = (
        "weights: with copies and averages of them; activations: with the weights in 16 bits in half precision. "
        "Gradients come as activations go, so that the larger of both counts, and their sum where a step is read in "
        "pieces"
    )
    return table


def _notes(plan: Plan) -> list[str]:
    """What the figures of nodes that are still to be made rest on, each with the nodes."""
    notes: dict[str, list[str]] = {}
    for name, step in plan.steps.items():
        if _to_make(step) and step.estimate.note:
            notes.setdefault(step.estimate.note, []).append(name)
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def _misread(plan: Plan) -> list[str]:
    """A hint for each data set that looks as if another source were meant."""
    hints = {name: misread(settings, plan.recipe.root) for name, settings in plan.recipe.data.items()}
    return [f"{name}: {hint}" for name, hint in hints.items() if hint]


def _to_make(step: Step) -> bool:
    return step.state != "cached"


def _disk(plan: Plan) -> int:
    return sum(step.estimate.disk_bytes for step in plan.steps.values() if _to_make(step))


def _memory(plan: Plan) -> int:
    return max((step.estimate.memory_bytes for step in plan.steps.values() if _to_make(step)), default=0)


def _seconds(plan: Plan) -> float | None:
    """Time of everything still to be made, one after the other; None where a node's time is not known."""
    times = [step.estimate.seconds for step in plan.steps.values() if _to_make(step)]
    return None if None in times else sum(t for t in times if t is not None)


def count(number: float) -> str:
    """A number of parameters in words: `3.1M`."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.0f}"


def clock(seconds: float | None) -> str:
    """Seconds in words: `42 s`, `3.5 min`, `2.1 h`, `3 days`; `?` where they are not known."""
    if seconds is None:
        return "?"
    for least, factor, unit in ((48 * 3600, 24 * 3600, "days"), (3600, 3600, "h"), (60, 60, "min")):
        if seconds >= least:
            amount = seconds / factor
            return f"{amount:.2g} {unit}" if amount < 100 else f"{amount:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
