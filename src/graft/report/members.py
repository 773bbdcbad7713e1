"""What each member of an ensemble with fitted weights contributes, from the manifests of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graft.report.read import Run, is_number
from graft.report.words import fixed


@dataclass(frozen=True)
class Members:
    """An ensemble's members, a row each: name, weight, loss alone, what the others lose without it with its interval,
    Shapley value, share of the tokens it is needed at, and the correlation of its surprise with every member's."""

    model: str
    said: str
    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def members(run: Run) -> Iterator[Members]:
    """Of every ensemble whose weights were fitted; one whose manifest cannot be read is left out."""
    for name, model in run.models.items():
        metrics = model.manifest.get("metrics") or {}
        try:
            if model.verb == "ensemble" and "member_losses" in metrics:
                yield _members(name, metrics)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue


def _members(model: str, metrics: Mapping[str, Any]) -> Members:
    alone, weights = metrics["member_losses"], metrics["weights"]
    names = tuple(weights)
    best = min(names, key=lambda name: alone[name])
    said = f"loss {fixed(metrics['loss'], 4)} nats a token; the best member alone, {best}, has {fixed(alone[best], 4)}"
    return Members(model, said, names, tuple(_row(name, names, metrics) for name in names))


def _row(name: str, names: tuple[str, ...], metrics: Mapping[str, Any]) -> tuple[str, ...]:
    found = metrics.get("contributions", {}).get(name, {})
    low, high = found.get("low"), found.get("high")
    missed = _number(found.get("left_out"), sign=True)
    missed += f" ({fixed(low, 4, sign=True)} to {fixed(high, 4, sign=True)})" if is_number(low) else ""
    needed = metrics.get("needed", {}).get(name)
    related = metrics.get("error_correlation", {}).get(name, {})
    return (
        name,
        fixed(metrics["weights"][name], 3),
        _number(metrics["member_losses"][name]),
        missed,
        _number(found.get("shapley")),
        f"{needed:.0%}" if is_number(needed) else "–",
        *(f"{related[other]:.2f}" if is_number(related.get(other)) else "–" for other in names),
    )


def _number(value: Any, *, sign: bool = False) -> str:
    return fixed(value, 4, sign=sign) if is_number(value) else "–"
