"""What people read when an ensemble has been made: its weights, what they were fitted to, who contributes. Light."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lines(metrics: Mapping[str, Any]) -> list[str]:
    """A line of the whole and one of each member, where weights were fitted; what a union does not mix."""
    lost = metrics.get("unmatched_mass", {})
    told = ", ".join(f"{name} {mass:.1%}" for name, mass in lost.items())
    beside = [f"mass on tokens that not all members have, which is passed on rather than mixed: {told}"] if lost else []
    return [*(_fitted(metrics) if "loss" in metrics else ()), *beside]


def _fitted(metrics: Mapping[str, Any]) -> Iterator[str]:
    alone = metrics["member_losses"]
    best = min(alone, key=lambda name: alone[name])
    gate = f", {metrics['loss_without_gate']:.4f} without the gate" if "loss_without_gate" in metrics else ""
    about = f"about (from {metrics['top_k']} tokens and a tail) " if "top_k" in metrics else ""
    yield (
        f"loss {about}{metrics['loss']:.4f} nats a token on what the weights were fitted to{gate}; the best member "
        f"alone, {best}, has {alone[best]:.4f}"
    )
    width = max(map(len, alone))
    for name, weight in metrics["weights"].items():
        yield f"  {name:<{width}}  weight {weight:+.3f}  alone {alone[name]:.4f}{_missed(metrics, name)}"


def _missed(metrics: Mapping[str, Any], name: str) -> str:
    """What the others lose without a member, and the rest that is known of it."""
    found = metrics.get("contributions", {}).get(name)
    needed = metrics.get("needed", {}).get(name)
    run = "" if needed is None else f"  needed at {needed:.0%}"
    if found is None:
        return run
    ends = f" ({found['low']:+.4f} to {found['high']:+.4f})" if found.get("low") is not None else ""
    value = f"  Shapley {found['shapley']:.4f}" if found.get("shapley") is not None else ""
    return f"  missed by {found['left_out']:+.4f}{ends}{value}{run}"
