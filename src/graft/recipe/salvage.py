"""What can be read of settings of which a part is wrong, so that what else is wrong is told in the same go."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from graft.errors import Problem, SettingsError, UnknownName, closest

Where = tuple[str | int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Salvaged(Generic[T]):
    """`settings` is None where nothing can be read; `sure` where no more than names had to be put right."""

    settings: T | None
    problems: list[Problem]
    sure: bool


def salvaged(parse: Callable[[Any], T], raw: Any, path: Where) -> Salvaged[T]:
    """What `parse` gives of `raw`, which stands at `path`, with wrong names put right and wrong values left out.

    It is parsed again until nothing is wrong, so that what only a later look finds is among the problems as well.
    """
    raw, problems, left_out = copy.deepcopy(raw), list[Problem](), list[Where]()
    while True:
        try:
            return Salvaged(parse(raw), problems, not left_out)
        except UnknownName as error:
            problems.append(Problem(path, str(error)))
            if not (meant := closest(error.name, error.valid)) or not _rename(raw, error.name, meant):
                return Salvaged(None, problems, False)
            continue
        except SettingsError as error:
            found = error.problems
        problems += [p for p in found if p not in problems and not _owed(p, left_out)]
        mended = [_mend(raw, p.path[len(path) :], p.message) for p in found]
        left_out += [(*path, *gone) for mend in mended if mend for gone in mend]
        if all(mend is None for mend in mended):
            return Salvaged(None, problems, False)


def _owed(problem: Problem, left_out: Sequence[Where]) -> bool:
    """Whether a problem may come of a value that was left out: it stands at its place, or around it and names it, or
    asks for more where nothing is left."""
    around, emptied = len(problem.path), problem.message.endswith("found {}")
    inside = [gone[around:] for gone in left_out if gone[:around] == problem.path]
    return any(not rest or emptied or _names(problem.message, rest[0]) for rest in inside)


def _names(message: str, key: str | int) -> bool:
    """Whether `key` is among the words of a message, be it in the singular."""
    return re.search(rf"\b{re.escape(str(key).removesuffix('s'))}s?\b", message) is not None


def _mend(raw: Any, place: Where, message: str) -> list[Where] | None:
    """Put right what is wrong at `place` of `raw`: the places of the values that were left out for it (none for a name
    put right), None where nothing can be done. Of values that do not go together, all that are named are left out."""
    if not place:
        asked = message.partition(", found ")[0]
        together = [key for key in raw if _names(asked, key)] if isinstance(raw, dict) else []
        for key in together:
            del raw[key]
        return [(key,) for key in together] or None
    held, key, walked = _holder(raw, place)
    if held is None:
        return None
    meant = re.search(r"^unknown .*\(did you mean '([^']+)'\?\)", message)
    if meant and message.startswith("unknown key"):
        value = held.pop(key)
        if meant[1] not in held:
            held[meant[1]] = value
            return []
        return [walked]
    if meant and isinstance(held[key], str) and len(walked) == len(place):
        held[key] = meant[1]
        return []
    del held[key]
    return [walked]


def _rename(raw: Any, name: str, meant: str) -> bool:
    """Write `meant` for the first key or value `name` in `raw`; whether there was one."""
    for key, value in list(raw.items()) if isinstance(raw, dict) else list(enumerate(raw)):
        if isinstance(raw, dict) and key == name:
            raw[meant] = raw.pop(key)
            return True
        if value == name:
            raw[key] = meant
            return True
        if isinstance(value, dict | list) and _rename(value, name, meant):
            return True
    return False


def _holder(raw: Any, place: Where) -> tuple[dict[Any, Any] | None, Any, Where]:
    """(mapping, key, where) of the deepest value of a mapping on the way to `place`; that of a list goes as a whole.

    None where `place` ends in a key that is not there. Names of branches of a union are no steps.
    """
    found: tuple[dict[Any, Any] | None, Any, Where] = (None, None, ())
    walked: list[str | int] = []
    for number, step in enumerate(place):
        inside = isinstance(raw, dict) and step in raw
        if inside:
            walked.append(step)
            found = raw, step, tuple(walked)
            raw = raw[step]
        elif isinstance(raw, dict) and number == len(place) - 1:
            return None, None, ()
        elif isinstance(raw, list):
            break
    return found
