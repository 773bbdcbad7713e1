"""Positions that learned keys and tokens need, and those that a model has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from graft.adapters.point import Point
from graft.errors import RequestError
from graft.folders import CONTEXTS

TABLES = re.compile(r"(?<!relative_)(wpe|position)[^.]*$")
"""What tables of positions are called."""


def positions_in(model: Any, config: Mapping[str, Any]) -> int | None:
    """For how many tokens a model of this configuration has positions in a table; None where they are computed."""
    # some tables have rows before the first position
    found = [table.num_embeddings - first_in(table) for table in tables_of(model)]
    named = [size for name in CONTEXTS if isinstance(size := config.get(name), int) and size > 0]
    return min([*found, *named]) if found else None


def tables_of(model: Any) -> list[Any]:
    """Tables of learned positions."""
    from torch import nn

    named = [part for name, part in model.named_modules() if TABLES.search(name)]
    return [table for table in named if isinstance(table, nn.Embedding)]


def first_in(table: Any) -> int:
    """The row of the first token: behind that of padding where there is one, as in RoBERTa's."""
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1


def taken_by(points: Iterable[Point]) -> int:
    """Positions that learned keys and tokens take before the text."""
    return max((p.size or 0 for p in points if p.shift or (p.form == "tokens" and not p.gate)), default=0)


def check_positions(model: Any, points: Iterable[Point]) -> None:
    """Raises RequestError for learned tokens, or keys that shift the text, for which `model` has no positions."""
    # a token of text has a place behind those that shift it; tokens behind a gate are read by themselves
    needed = [(p.size or 0) + bool(taken_by([p])) for p in points if p.form == "tokens" or p.shift]
    if not needed or (most := positions_in(model, model.config.to_dict())) is None or max(needed) <= most:
        return
    asked = max(needed)
    raise RequestError(
        f"expected learned tokens for which the model has positions, of which it has {most} in a table, found a "
        f"`length` that needs {asked}: give a smaller `length`, or choose a prefix, whose keys need none"
    )
