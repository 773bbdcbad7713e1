"""The parameters that a search may turn: from numbers to the settings of a merge. Light."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from graft.errors import SettingsError, nearest
from graft.merge.judged import Range, Search
from graft.merge.varying import parse_varying

if TYPE_CHECKING:
    from graft.merge.settings import MergeSettings

M = TypeVar("M", bound="MergeSettings")


def altered(settings: M, values: Mapping[str, Any]) -> M:
    """The same merge with other parameters, and nothing searched or reported.

    `weights` holds one for each model, `density.coder` is that of one model; a list is a gradient over the layers.
    Raises SettingsError for what the method does not take.
    """
    raw = settings.plain() | {"search": None, "seeds": None, "barrier": None}
    for key, value in values.items():
        name, _, model = key.partition(".")
        if key == "weights":
            raw["models"] = dict(zip(settings.names, value, strict=True))
        elif model:
            own = raw[name]
            raw[name] = (own if isinstance(own, dict) else dict.fromkeys(settings.names, own)) | {model: value}
        else:
            raw[name] = round(value) if isinstance(value, float) and _is_whole(settings, name) else value
    return parse_varying(type(settings), raw)


def _is_whole(settings: MergeSettings, name: str) -> bool:
    """Whether a parameter counts something: numbers between are rounded then."""
    annotation = type(settings).model_fields[name].annotation
    return int in (annotation, *typing.get_args(annotation)) and float not in typing.get_args(annotation)


def check(settings: MergeSettings, search: Search) -> None:
    """Raises ValueError for a parameter that the method does not have and for values that it does not take."""
    from graft.merge.settings import MergeSettings

    _check_way(search)
    known = ["weights", *(name for name in type(settings).model_fields if name not in MergeSettings.model_fields)]
    for key, places in search.over.items():
        name, _, model = key.partition(".")
        if name not in known or (model and model not in settings.names):
            there = ", ".join(known)
            raise ValueError(f"expected a parameter of {settings.method} ({there}), found {key!r}{nearest(key, known)}")
        for value in places.ends:
            one = value if search.by_layer is None else [value] * search.by_layer
            try:
                altered(settings, {key: [one] * len(settings.names) if key == "weights" else one})
            except SettingsError as error:
                why = "; ".join(problem.message for problem in error.problems)
                raise ValueError(
                    f"expected values of {key} that {settings.method} takes, found {value!r}: {why}"
                ) from None
    if search.way == "grid":
        Space(settings, search).axes()


def _check_way(search: Search) -> None:
    listed = [key for key, places in search.over.items() if places.values is not None]
    if listed and search.way != "grid":
        raise ValueError(f"expected [lowest, highest] for {listed[0]}, as {search.way} needs; lists go with `by: grid`")
    if search.way == "golden" and (len(search.over) > 1 or "weights" in search.over or search.by_layer is not None):
        raise ValueError("expected one number for a golden section, found several: use `by: cma_es` or `by: grid`")
    if listed and search.by_layer is not None:
        raise ValueError(f"expected [lowest, highest] for {listed[0]}, as numbers by layer need")


def per_axis(evaluations: int, listed: Sequence[int], axes: int) -> int:
    """How many values each of `axes` ranges has on a grid of at most so many merges, beside lists of such lengths.

    Raises ValueError where there are not two for each.
    """
    rest = evaluations // math.prod(listed)
    each = next((n for n in range(rest, 1, -1) if n**axes <= rest), 0) if axes else int(rest > 0)
    if not each:
        needed = math.prod(listed) * 2**axes
        raise ValueError(f"expected at least {needed} evaluations for this grid, found {evaluations}")
    return each


class Space:
    """The search space as a cube: each number of each parameter runs from 0 to 1."""

    def __init__(self, settings: MergeSettings, search: Search):
        self.settings, self.search = settings, search
        self.ranges: list[Range] = []
        for key, places in search.over.items():
            self.ranges += [places] * (self._models(key) * (search.by_layer or 1))

    def _models(self, key: str) -> int:
        return len(self.settings.names) if key == "weights" else 1

    def __len__(self) -> int:
        return len(self.ranges)

    def axes(self) -> list[list[Any]]:
        """The values of each number on a grid: those listed, or as many at equal distances as the evaluations allow."""
        listed = [places.values for places in self.ranges if places.values is not None]
        each = per_axis(self.search.evaluations, [len(values) for values in listed], len(self.ranges) - len(listed))
        return [
            places.values or [places.low + i / (each - 1) * (places.high - places.low) for i in range(each)]
            for places in self.ranges
        ]

    def start(self) -> list[float]:
        """Where the merge as it is written lies in the cube; the middle for what is written otherwise or not inside.

        A number at the end of its range is one that nobody chose (a weight of 1): half of the draws around it are lost.
        """
        written = [value for key in self.search.over for value in self._written(key)]
        inside = [(value - r.low) / (r.high - r.low) for r, value in zip(self.ranges, written, strict=True)]
        return [place if 0 < place < 1 else 0.5 for place in inside]

    def _written(self, key: str) -> list[float]:
        """The numbers of a parameter as they are written, as often as they are searched; NaN for no plain number."""
        name, _, model = key.partition(".")
        value: Any = getattr(self.settings, name, None)
        if model and isinstance(value, Mapping):
            value = value[model]
        found = self.settings.weights if key == "weights" else [value]
        numbers = [float(one) if isinstance(one, int | float) else float("nan") for one in found]
        return [one for one in numbers for _ in range(self.search.by_layer or 1)]

    def values(self, point: Sequence[float]) -> list[float]:
        """The numbers at a point of the cube."""
        return [r.low + float(x) * (r.high - r.low) for r, x in zip(self.ranges, point, strict=True)]

    def parameters(self, values: Sequence[Any]) -> dict[str, Any]:
        """The parameters, as a recipe would give them, from their numbers in order."""
        rest = iter(values)
        layers = self.search.by_layer

        def one() -> Any:
            return next(rest) if layers is None else [next(rest) for _ in range(layers)]

        return {
            key: [one() for _ in range(self._models(key))] if key == "weights" else one() for key in self.search.over
        }

    def merge(self, values: Sequence[Any]) -> MergeSettings:
        """The merge with these numbers. Raises SettingsError where the method does not take them together."""
        return altered(self.settings, self.parameters(values))
