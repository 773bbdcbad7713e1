"""Merging a part of a model: which tensors, what the others call them, and what is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graft.errors import CannotCombine

if TYPE_CHECKING:
    from graft.checkpoint import Headers
    from graft.merge.settings import MergeSettings


def prefixes(part: list[str] | dict[str, str]) -> dict[str, str]:
    """Prefix in the first parent → prefix in the others, longest first."""
    found = part if isinstance(part, dict) else {prefix: prefix for prefix in part}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def partial(
    settings: MergeSettings, headers: Mapping[str, Headers], tied: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Where each tensor of the output stands: all of the first parent's, those of the part in the others as well.

    A parent that has a tensor under the first one's name needs no other prefix. Raises CannotCombine for a prefix that
    no tensor has and for tensors of the part that a parent lacks.
    """
    assert settings.part is not None
    reference, *others = settings.parents
    wanted = prefixes(settings.part)
    places: dict[str, dict[str, str]] = {}
    lacking: dict[str, list[str]] = {name: [] for name in others}
    used = set()
    for tensor in sorted(headers[reference]):
        places[tensor] = {reference: tensor}
        prefix = next((one for one in wanted if tensor.startswith(one)), None)
        if prefix is None:
            continue
        used.add(prefix)
        for name in others:
            options = [tensor, wanted[prefix] + tensor.removeprefix(prefix)]
            there = next(filter(None, (_at(option, headers[name], tied[name]) for option in options)), None)
            if there is None:
                lacking[name].append(options[-1])
            else:
                places[tensor][name] = there
    if idle := [prefix for prefix in wanted if prefix not in used]:
        start = ", ".join(sorted({name.partition(".")[0] for name in headers[reference]}))
        raise CannotCombine(f"{reference} has no tensor that begins with {idle[0]!r}; its tensors begin with {start}")
    for name, missing in lacking.items():
        if missing:
            raise CannotCombine(
                f"{name} lacks {len(missing)} tensors of the part that is merged: {', '.join(missing[:3])}; say how "
                f"its names begin, as `part: {{{next(iter(wanted))}: …}}`"
            )
    return places


def _at(name: str, headers: Headers, tied: Mapping[str, str]) -> str | None:
    return name if name in headers else tied.get(name)
