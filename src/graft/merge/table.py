"""All methods as a table, written from their settings; `python -m graft.merge.table` is what the guide shows. Light."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from graft.merge._options import OnData, SubspaceSettings
from graft.merge.judged import Judged, NeedsData
from graft.merge.settings import MergeSettings
from graft.settings import said_first

COMMON = {*MergeSettings.model_fields, *Judged.model_fields, "base", "of"}
"""What methods share, or is said of them as what they need."""


def rows(methods: Mapping[str, type[MergeSettings]]) -> list[dict[str, str]]:
    """A row a method: what it does, what it needs, its options with their defaults."""
    return [
        {"method": name, "does": said_first(cls), "needs": ", ".join(needs(cls)), "options": ", ".join(options(cls))}
        for name, cls in methods.items()
    ]


def needs(cls: type[MergeSettings]) -> Iterator[str]:
    """What must be given and be so, in words."""
    fields = cls.model_fields
    yield _models(cls)
    if "base" in fields:
        yield "base" if fields["base"].is_required() else "base (optional)"
    if _reads(cls):
        needed = fields["on"].is_required() or issubclass(cls, NeedsData)
        yield ("text" if issubclass(cls, OnData) else "held-out data") + (" (on)" if needed else " (on, optional)")
    if issubclass(cls, OnData):
        yield "causal language models"
    if cls.aligns:
        yield "one vocabulary, any initialisation"
    if cls.draws:
        yield "a seed"
    if issubclass(cls, SubspaceSettings):
        yield "matrices whole in memory"


def _reads(cls: type[MergeSettings]) -> bool:
    """Whether `on` names data, and not tensors."""
    return "on" in cls.model_fields and (issubclass(cls, OnData | Judged) or cls.model_fields["on"].is_required())


def _models(cls: type[MergeSettings]) -> str:
    """How many models, and of what kind."""
    if "of" in cls.model_fields:
        return "a model whose training kept checkpoints (of)"
    field = cls.model_fields["models"]
    least, most = (next((getattr(m, end) for m in field.metadata if hasattr(m, end)), None) for end in ENDS)
    if most == 1:
        return "one model" if least else "one model, or slices of several"
    what = "adapters" if cls.of_one_base else "models"
    weighted = "" if get_origin(field.annotation) is list else " with weights"
    return f"two {what}{weighted}" if least == most == 2 else f"{what}{weighted}"


ENDS = ("min_length", "max_length")


def options(cls: type[MergeSettings]) -> Iterator[str]:
    """`name: default` of what the method alone takes; the name alone where it has to be given."""
    for name, field in cls.model_fields.items():
        if name not in COMMON or (name == "on" and not _reads(cls)):
            yield name if field.is_required() else f"{name}: {_plain(field.get_default())}"


def _plain(value: Any) -> str:
    """A default as a recipe would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def markdown(found: list[dict[str, str]]) -> str:
    """The rows as the guide has them."""
    head = ["| method | needs | options of its own, with defaults |", "|---|---|---|"]
    coded = (", ".join(f"`{one}`" for one in row["options"].split(", ") if one) for row in found)
    lines = (f"| `{row['method']}` | {row['needs']} | {code} |" for row, code in zip(found, coded, strict=True))
    return "\n".join([*head, *lines]) + "\n"


if __name__ == "__main__":
    from graft.merge import VERB

    print(markdown(VERB.methods({})), end="")
