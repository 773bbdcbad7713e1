"""Strict settings: the base class of everything a person writes in a recipe, the units, and the references.

A settings class is a frozen pydantic model that forbids unknown keys; its field descriptions become the help text and
the recipe reference. A field typed `ModelRef` or `DataRef` names another node: `references` finds them from the types,
so that a recipe's order follows from its settings and from nothing else.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from graft.errors import SettingsError
from graft.misfits import problems


class Settings(BaseModel):
    """Base of all settings: frozen, every key known, every value of its type."""

    model_config = ConfigDict(
        defer_build=True,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    placement: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where and by how many the work is done, and nothing of what comes out."""
    silent: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how often the work is saved and who is told of it, and nothing of what comes out."""

    def named_inside(self, path: tuple[str | int, ...]) -> Iterator[tuple[str, str, tuple[str | int, ...]]]:
        """References, as `references` gives them, that the types of its fields do not tell; `path`: where it stands."""
        return iter(())

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values under the names people write (`from`, not `from_`), defaults included."""
        return self.model_dump(mode="json", by_alias=True)

    def content(self) -> dict[str, Any]:
        """`plain()` without what says where the work is done, and with the defaults of what says how it is saved and
        told: what decides the result."""
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in sorted(self.silent)}
        return self.model_dump(mode="json", by_alias=True, exclude=set(self.placement)) | defaults


def said_first(settings: type[Settings]) -> str:
    """The first sentence that is said of settings, in one line."""
    return " ".join((settings.__doc__ or "").split()).split(". ")[0].removesuffix(".")


@dataclass(frozen=True)
class Ref:
    """Marks a string as the name of another node: `kind` is `model` or `data`."""

    kind: str


ModelRef = Annotated[str, Ref("model")]
"""The name of a model of the recipe (or, outside a recipe, a folder or hub id)."""

DataRef = Annotated[str, Ref("data")]
"""The name of a data set of the recipe, optionally with a split: `mixed` or `mixed.dev`."""


@dataclass(frozen=True)
class Varies:
    """Marks a number for which a gradient over the layers or rules by tensor name may be written."""


Number = Annotated[float, Varies()]
"""A number that may differ between tensors: `0.5`, `[0, 0.5, 1]` over the layers, `{"*.mlp.*": 0.3, "*": 0.5}`."""

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _count(unit: str) -> BeforeValidator:
    pattern = re.compile(rf"\s*([\d_.]+)\s*([kmbgt]?)\s*(?:{unit})?\s*", re.IGNORECASE)

    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = pattern.fullmatch(value)
        if not found:
            raise ValueError(f"expected a number of {unit} such as 3M or '500k {unit}', found {value!r}")
        return round(float(found[1].replace("_", "")) * _FACTORS[found[2].lower()])

    return BeforeValidator(parse)


def _parse_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([\d_.]+)\s*([kmgt]?i?b)\s*", value, re.IGNORECASE)
    if not found or found[2].lower() not in _BYTES:
        raise ValueError(f"expected a size such as 24GB or 512MiB, found {value!r}")
    return round(float(found[1].replace("_", "")) * _BYTES[found[2].lower()])


Tokens = Annotated[int, _count("tokens")]
"""A number of tokens: `2M tokens`, `2M`, `2000000`."""

Parameters = Annotated[int, _count("parameters")]
"""A number of parameters: `3M`, `1.1B`, `3000000`."""

Bytes = Annotated[int, BeforeValidator(_parse_bytes)]
"""A size in bytes: `24GB` (10⁹), `512MiB` (2²⁰) or a plain number."""

S = TypeVar("S", bound=Settings)


def parse(cls: type[S], raw: Any, path: tuple[str | int, ...] = ()) -> S:
    """`raw` (plain YAML values) as settings of type `cls`; `path` is where they stand in the file.

    Raises SettingsError with every problem found; an unknown key is shown with the nearest right one.
    """
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(problems(cls, error.errors(), raw, path)) from None


def references(
    settings: BaseModel, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[str, str, tuple[str | int, ...]]]:
    """Every reference in `settings`: (kind, name as written, where)."""
    for name, field in type(settings).model_fields.items():
        annotation = field.annotation
        if field.metadata:
            annotation = Annotated[annotation, *field.metadata]  # type: ignore[assignment]
        yield from _references(getattr(settings, name), annotation, (*path, field.alias or name))
    if isinstance(settings, Settings):
        yield from settings.named_inside(path)


def _references(
    value: Any, annotation: Any, path: tuple[str | int, ...]
) -> Iterator[tuple[str, str, tuple[str | int, ...]]]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, BaseModel):
        yield from references(value, path)
    elif origin is Annotated:
        marks = [m for m in arguments[1:] if isinstance(m, Ref)]
        if marks and isinstance(value, str):
            yield marks[0].kind, value, path
        else:
            yield from _references(value, arguments[0], path)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            if _fits(value, argument):
                yield from _references(value, argument, path)
                return
    elif isinstance(value, Mapping) and len(arguments) == 2:
        for key, item in value.items():
            yield from _references(key, arguments[0], (*path, key))
            yield from _references(item, arguments[1], (*path, key))
    elif isinstance(value, list | tuple) and arguments:
        for index, item in enumerate(value):
            inner = arguments[0] if len(arguments) == 1 or arguments[-1] is Ellipsis else arguments[index]
            yield from _references(item, inner, (*path, index))


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value that has been validated came from this branch of a union, as far as the outer type tells."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _fits(value, typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    kind = origin or annotation
    return isinstance(kind, type) and isinstance(value, kind)
