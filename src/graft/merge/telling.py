"""What was found out before a merge, in lines for people. Light."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def lines(notes: Mapping[str, Any]) -> list[str]:
    """A few lines of a manifest's notes; none where the merge looked at nothing."""
    told: dict[str, Callable[[Any], Iterator[str]]] = {
        "search": _search,
        "greedy_soup": _greedy,
        "learned_soup": _learned,
        "checkpoints": _checkpoints,
        "seeds": _seeds,
        "entropy_by_step": _entropy,
        "share_in_region": _regions,
        "merged_by_regression": _regression,
    }
    return [line for key, words in told.items() if key in notes for line in words(notes[key])]


def _search(found: Mapping[str, Any]) -> Iterator[str]:
    turned = ", ".join(f"{name} {_value(value)}" for name, value in found["parameters"].items()) or "as written"
    scores = f"{_value(found['best'])}, as written {_value(found['as_written'])}"
    yield f"searched by {found['by']}, {len(found['tried'])} merges: {turned} gives {found['metric']} {scores}"


def _greedy(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"greedy soup by {found['metric']} on {', '.join(found['on'])}:"
    for one in found["decisions"]:
        inside = _value(one["with"]) if one["without"] is not None else "the first"
        taken = "taken" if one["taken"] else "left"
        yield f"  {one['model']}: alone {_value(one['alone'])}, in the soup {inside}: {taken}"


def _learned(found: Mapping[str, Any]) -> Iterator[str]:
    losses = found["losses"]
    yield f"learned shares: {losses[0]:.4f} nats a token with equal ones, {min(losses):.4f} with the best"
    for group, shares in found["shares"].items():
        yield f"  {group}: {_value(shares)}"


def _checkpoints(found: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "averaged: " + ", ".join(f"{one['name']} ({one['share']:.3g})" for one in found)


def _seeds(found: Mapping[str, Any]) -> Iterator[str]:
    apart, cosine = found["distance"], found["cosine"]
    yield (
        f"{len(found['seeds'])} seeds: {apart['mean']:.1%} of the task vector's length apart "
        f"({apart['least']:.1%} to {apart['most']:.1%}), cosine {cosine['mean']:.3f}"
    )
    if "score" in found:
        score = found["score"]
        yield (
            f"  {found['metric']} {_value(score['mean'])} ± {_value(found['deviation'])} "
            f"({_value(score['least'])} to {_value(score['most'])})"
        )


def _entropy(found: list[float]) -> Iterator[str]:
    if found:
        yield f"learned λ in {len(found)} steps: entropy {found[0]:.4f} to {found[-1]:.4f} nats a token"


def _regions(found: Mapping[str, float]) -> Iterator[str]:
    yield "regions: " + ", ".join(f"{name} {share:.2%}" for name, share in found.items())


def _regression(found: int) -> Iterator[str]:
    yield f"{found} tensors merged by regression, the others by their mean"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
