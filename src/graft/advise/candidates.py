"""Methods as they would be trained here: sized for a share of the parameters, and what memory each then needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graft.adapters.point import Point
from graft.adapters.trial import counter
from graft.methods import method
from graft.plan.fit import packed, ways
from graft.settings import Settings
from graft.verb import Facts, Verb
from graft.verbs import verb

SIZES = {
    "lora": "rank", "houlsby": "width", "pfeiffer": "width", "parallel_adapter": "width",
    "scaled_parallel_adapter": "width", "mix_and_match": "width", "prefix": "length", "prompt": "length",
}  # fmt: skip
"""The option by which a method grows."""
TOO_LARGE = 2.0
"""A method that cannot be made smaller than this many times what is wanted is left out."""
KEYS = 0.15
"""Share of a mix-and-match adapter's numbers that go into its keys: 30 keys beside a width of 512 in the paper."""

Count = Callable[[Sequence[Point]], int | None]
"""Trained numbers of points in one model; None where they do not fit it."""


@dataclass(frozen=True)
class Candidate:
    """One way to tune this model."""

    method: str
    options: Mapping[str, Any]
    trained: int
    share: float
    """Percent of the model's parameters."""
    memory_bytes: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the training that make it fit."""
    packed: bool = False
    """Whether it stands on the base in 4 bits, without which it does not fit."""
    why_not: str = ""
    """What is in the way; empty where nothing is."""


def sized(names: Sequence[str], facts: Facts, wanted: int) -> list[Candidate]:
    """The methods with about `wanted` trained numbers each, those that fit the model; all weights first."""
    count = counter(facts.config)
    whole = Candidate("full", {}, facts.parameters, 100.0)
    return [whole, *(_sized(name, facts.parameters, wanted, count) for name in names if name != "full")]


def _sized(name: str, parameters: int, wanted: int, count: Count) -> Candidate:
    options: dict[str, Any] = {}
    if name == "mix_and_match":
        options["length"] = min(30, _size(name, "length", {"width": 1}, int(KEYS * wanted), count) or 1)
    if name in SIZES:
        size = _size(name, SIZES[name], options, wanted, count)
        if size is None:
            return Candidate(name, {}, 0, 0.0, why_not="it finds no place in this model")
        options[SIZES[name]] = size
    trained = _count(name, options, count)
    if trained is None:
        return Candidate(name, options, 0, 0.0, why_not="it finds no place in this model")
    found = Candidate(name, options, trained, 100 * trained / parameters)
    if trained > TOO_LARGE * wanted:
        return replace(found, why_not=f"at its smallest it trains {trained:,} numbers, where {wanted:,} are wanted")
    return found


def _count(name: str, options: Mapping[str, Any], count: Count) -> int | None:
    chosen = method("graft.tune", name)
    return count(chosen.points(chosen.Settings(**options)))


def _size(name: str, option: str, others: Mapping[str, Any], wanted: int, count: Count) -> int | None:
    """The value of `option` that gives about `wanted` numbers: they grow with it in a straight line."""
    one, two = (_count(name, {**others, option: size}, count) for size in (1, 2))
    if one is None or two is None:
        return None
    size = max(1, round((wanted - one) / (two - one)) + 1)
    while size > 1 and _count(name, {**others, option: size}, count) is None:  # a rank above a layer's size
        size //= 2
    return size


def fitted(found: Candidate, facts: Facts, training: Mapping[str, Any], limit: int | None) -> Candidate:
    """The candidate with the memory it needs, and with what makes it fit into `limit` bytes."""
    if found.why_not:
        return found
    tune: Verb[Any] = verb("tune")
    settings = tune.parse({"from": "base", "method": {found.method: found.options}, **training})
    if found.method == "full" and (wrong := tune.check(settings, {"base": facts})):
        return replace(found, why_not=wrong[0].replace("base is quantised", "its weights are packed", 1))
    said = _fits(found, tune, settings, facts, limit)
    if not said.why_not or found.method == "full" or facts.stored == "quantised":
        return said
    small = packed(facts)
    return said if small is None else replace(_fits(found, tune, settings, small, limit), packed=True)


def _fits(found: Candidate, tune: Verb[Any], settings: Settings, facts: Facts, limit: int | None) -> Candidate:
    needed = tune.estimate(settings, {"base": facts}).memory_bytes
    if limit is None or needed <= limit:
        return replace(found, memory_bytes=needed)
    changes = ways(tune, settings, {"base": facts}, limit)
    if not changes:
        return replace(found, memory_bytes=needed, why_not="it does not fit into the memory, whatever its settings")
    change, size = changes[0]
    return replace(found, memory_bytes=size, changes=dict(change))
