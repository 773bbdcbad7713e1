"""Numbers of a method that follow the layers or the names of tensors: what is written, and what a tensor gets.

`[0, 0.5, 1]` is a gradient: the first number at the first layer, the last at the last, straight lines between.
`{"*.mlp.*": 0.3, "*": 0.5}` are rules: the first pattern that a tensor's name matches. A rule may hold a gradient.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

from graft.errors import CannotCombine, Problem, SettingsError
from graft.merge.slices import depths
from graft.settings import Varies, parse

if TYPE_CHECKING:
    from graft.merge.settings import MergeSettings

Spot = tuple[str, ...]
"""Where a number stands: `("density",)`, or of one model, `("density", "a")`."""
WILD = "*?["

M = TypeVar("M", bound="MergeSettings")


@dataclass(frozen=True)
class Varied:
    """A number for every tensor."""

    rules: tuple[tuple[str, tuple[float, ...]], ...]
    """(pattern, gradient), the pattern `*` last."""

    def at(self, tensor: str, depth: float) -> float:
        """The number for a tensor at `depth`: 0 the first layer, 1 the last."""
        return _between(next(stops for pattern, stops in self.rules if fnmatchcase(tensor, pattern)), depth)

    def under(self, pattern: str, depth: float) -> float:
        """The number of the rule that is written `pattern`, or of the last."""
        return _between(dict(self.rules).get(pattern, self.rules[-1][1]), depth)


def _between(stops: tuple[float, ...], depth: float) -> float:
    place = depth * (len(stops) - 1)
    low = min(int(place), len(stops) - 1)
    high = min(low + 1, len(stops) - 1)
    return stops[low] + (place - low) * (stops[high] - stops[low])


def parse_varying(cls: type[M], raw: Any, path: tuple[str | int, ...] = ()) -> M:
    """Settings in which numbers marked `Varies` may be gradients or rules; their fields hold one of the numbers.

    All numbers are checked as if each stood alone. Raises SettingsError.
    """
    _, varied = split(cls, raw, path)
    for numbers in _corners(varied):
        parse(cls, replaced(raw, numbers), path)
    made = parse(cls, raw, path)
    if wrong := [spot for spot in varied if spot[0] in made.of_the_whole_model]:
        words = "expected one number, as it is measured over the whole model, found several"
        raise SettingsError([Problem((*path, *spot), words) for spot in wrong])
    return made


def split(cls: type[MergeSettings], raw: Any, path: tuple[str | int, ...] = ()) -> tuple[Any, dict[Spot, Varied]]:
    """(`raw` with plain numbers, what varies in it). Raises SettingsError for a gradient or rules that cannot be."""
    if not isinstance(raw, Mapping):
        return raw, {}
    varied = {spot: _read(value, (*path, *spot)) for spot, value in _spots(cls, raw)}
    return replaced(raw, {spot: one.rules[-1][1][-1] for spot, one in varied.items()}), varied


def _spots(cls: type[MergeSettings], raw: Mapping[str, Any]) -> Iterator[tuple[Spot, Any]]:
    """Where something else than a plain number is written for one that may vary."""
    for name, field in cls.model_fields.items():
        key = field.alias or name
        if key not in raw or not may_vary((field.annotation, *field.metadata)):
            continue
        value = raw[key]
        if isinstance(value, Mapping) and not _has_patterns(value):
            yield from (((key, model), v) for model, v in value.items() if isinstance(v, list | Mapping))
        elif isinstance(value, Mapping) or (isinstance(value, list) and name != "models"):
            yield (key,), value


def may_vary(annotation: Any) -> bool:
    """Whether the mark stands somewhere in a type."""
    if isinstance(annotation, Varies):
        return True
    inner = annotation if isinstance(annotation, tuple) else typing.get_args(annotation)
    return any(may_vary(argument) for argument in inner)


def _has_patterns(value: Mapping[str, Any]) -> bool:
    return any(sign in str(key) for key in value for sign in WILD)


def _read(value: Any, path: tuple[str | int, ...]) -> Varied:
    rules = value if isinstance(value, Mapping) else {"*": value}
    if list(rules)[-1:] != ["*"]:
        raise SettingsError([Problem(path, f"expected `*` as the last pattern, found {', '.join(map(str, rules))}")])
    return Varied(tuple((str(pattern), _stops(found, path)) for pattern, found in rules.items()))


def _stops(value: Any, path: tuple[str | int, ...]) -> tuple[float, ...]:
    stops = value if isinstance(value, list) else [value]
    if not stops or any(isinstance(stop, bool) or not isinstance(stop, int | float) for stop in stops):
        words = "a number, a gradient such as [0, 0.5, 1] or rules such as {'*.mlp.*': 0.3, '*': 0.5}"
        raise SettingsError([Problem(path, f"expected {words}, found {value!r}")])
    return tuple(float(stop) for stop in stops)


def _corners(varied: Mapping[Spot, Varied]) -> Iterator[dict[Spot, float]]:
    """Numbers that belong together, at every stop of every rule: what lies between them is right where these are."""
    patterns = {pattern: None for one in varied.values() for pattern, _ in one.rules}
    lengths = {len(stops) for one in varied.values() for _, stops in one.rules}
    places = {i / (n - 1) for n in lengths if n > 1 for i in range(n)} | {0.0}
    for pattern, depth in itertools.product(patterns, sorted(places)):
        yield {spot: one.under(pattern, depth) for spot, one in varied.items()}


def replaced(raw: Mapping[str, Any], values: Mapping[Spot, Any]) -> dict[str, Any]:
    """`raw` with other values at some places."""
    made = dict(raw)
    for (key, *inner), value in values.items():
        made[key] = {**made[key], inner[0]: value} if inner else value
    return made


def written(varied: Varied) -> Any:
    """As a person would write it."""
    rules = {pattern: list(stops) if len(stops) > 1 else stops[0] for pattern, stops in varied.rules}
    return rules["*"] if len(rules) == 1 else rules


def by_tensor(settings: M, places: Mapping[str, Mapping[str, str]]) -> dict[str, M]:
    """The settings of every tensor of the output: plain numbers, and only the models that it is made from.

    `places` are the output's tensors with their places in the models. Raises CannotCombine for a pattern that no
    tensor matches and for numbers that the method does not take together.
    """
    _no_idle_rules(settings, places)
    deep = depths(list(places))
    made: dict[tuple[Any, ...], M] = {}
    found = {}
    for tensor, place in places.items():
        numbers = {spot: one.at(tensor, deep[tensor]) for spot, one in settings.varied.items()}
        models = tuple(name for name in settings.names if name in place)
        own = (tuple(numbers.values()), models)
        if own not in made:
            made[own] = _narrowed(settings, tensor, numbers, models)
        found[tensor] = made[own]
    return found


def _narrowed(settings: M, tensor: str, numbers: Mapping[Spot, float], models: tuple[str, ...]) -> M:
    if not numbers and models in ((), tuple(settings.names)):
        return settings
    raw = replaced(settings.plain(), numbers)
    if models and models != tuple(settings.names):
        absent = set(settings.names) - set(models)
        raw = {key: _without(value, absent) for key, value in raw.items()} | {"slices": []}
        raw["models"] = raw["models"] if isinstance(raw["models"], dict) else list(models)
    try:
        return parse(type(settings), raw)
    except SettingsError as error:
        raise CannotCombine(f"{tensor}: {error}") from None


def _without(value: Any, models: set[str]) -> Any:
    """A mapping without some models."""
    if isinstance(value, dict) and models & set(value):
        return {name: one for name, one in value.items() if name not in models}
    return value


def _no_idle_rules(settings: MergeSettings, places: Mapping[str, Any]) -> None:
    for spot, one in settings.varied.items():
        for pattern, _ in one.rules:
            if pattern != "*" and not any(fnmatchcase(tensor, pattern) for tensor in places):
                raise CannotCombine(
                    f"{'.'.join(spot)}: no tensor matches {pattern!r}; the output has, for example, "
                    f"{', '.join(sorted(places)[:3])}"
                )
