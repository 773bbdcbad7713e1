"""The reference of everything a recipe may say, written from the settings types: `python -m graft.recipe_reference`.

What a field means is said once, in its `description`; this module only lays it out. `docs/recipe.md` is its output.
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graft.settings import Bytes, Parameters, Ref, Tokens, Varies

_UNITS = {
    "tokens, such as `2M tokens`": Tokens,
    "parameters, such as `3M`": Parameters,
    "bytes, such as `24GB`": Bytes,
}
_PLAIN = {Any: "settings", str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "none"}

INTRODUCTION = """# Everything a recipe may say

*Written from the settings types by `python -m graft.recipe_reference`; a test keeps it current. How the parts work
together is in the [guide](guide.md).*

```yaml
family: NAME
seed: 0
data:      {NAME: {source: …} or {mix: …}, …}
models:    {NAME: {VERB: SETTINGS}, …}
evaluate:  [{measure: …}, …]
report:    {ceiling: true}
```

A *model* is the name of another node of `models:`; a *data set* is a name of `data:`, where it makes sense with a split
behind it (`mixed.dev`). A node may have its own `seed:` beside its verb. Paths are relative to the recipe's folder. A
key that is not listed here is an error that shows the nearest right one.
"""


def reference() -> str:
    """The whole reference as Markdown."""
    from graft.data.settings import SOURCES, Mixture
    from graft.evaluate import MEASURES
    from graft.recipe.sections import Reported
    from graft.train.settings import TrainSettings
    from graft.verbs import verb, verb_names

    sources = [section(f"`source: {name}`", cls, skip=("source",)) for name, cls in SOURCES.items()]
    measures = [section(f"`measure: {name}`", cls, skip=("measure",)) for name, cls in MEASURES.items()]
    made = [verb(name) for name in verb_names()]
    types: list[type[BaseModel]] = [*SOURCES.values(), Mixture, *MEASURES.values()]
    types += [cls for found in made for cls in found.types().values()]
    parts = list(dict.fromkeys(itertools.chain.from_iterable(map(_inner, types))))
    written = [
        INTRODUCTION,
        "## Data\n",
        *sources,
        section("`mix:`", Mixture),
        "## Models\n",
        *(_verb(found.name, found.summary, found.types()) for found in made),
        section("Training settings", TrainSettings),
        "## Measures\n",
        *measures,
        section("Report", Reported, level=2),
        "## Settings inside settings\n",
        *(section(f"`{cls.__name__}`", cls) for cls in sorted(parts, key=lambda cls: cls.__name__)),
    ]
    return "\n".join(written).rstrip() + "\n"


def _verb(name: str, summary: str, types: Mapping[str, type[BaseModel]]) -> str:
    """A verb's heading and a section for each of its methods; training settings stand in a section of their own."""
    from graft.train.settings import TrainSettings

    parts = [f"### `{name}`\n\n{summary}\n"]
    for method, cls in types.items():
        trains = issubclass(cls, TrainSettings)
        heading = f"`{name}`" if method == name else f"`{name}`, method `{method}`"
        parts.append(section(heading, cls, level=4, skip=_inherited(cls, TrainSettings) if trains else ()))
        if trains:
            parts.append("And the [training settings](#training-settings).\n")
    return "\n".join(parts)


def _inherited(cls: type[BaseModel], base: type[BaseModel]) -> tuple[str, ...]:
    """The fields of `cls` that are as `base` has them."""
    same = (name for name, field in base.model_fields.items() if repr(cls.model_fields.get(name)) == repr(field))
    return tuple(same)


def section(title: str, cls: type[BaseModel], *, level: int = 3, skip: tuple[str, ...] = ()) -> str:
    """Heading, the type's docstring, and a table of its fields without those in `skip`."""
    rows = [_row(field.alias or name, field) for name, field in cls.model_fields.items() if name not in skip]
    table = ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    return "\n".join([f"{'#' * level} {title}\n", f"{_docstring(cls)}\n", *table])


def _docstring(cls: type[BaseModel]) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _row(key: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    meaning = meaning[:1].upper() + meaning[1:].removesuffix(".")
    cells = [f"`{key}`", words_of(annotation_of(field)), _default(field), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def annotation_of(field: FieldInfo) -> Any:
    """The type as it was written, with the marks that pydantic keeps apart."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def words_of(annotation: Any) -> str:
    """A type in words: `tokens, such as …`, `model`, `` `a` or `b` ``, `list of text`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _marked(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return " or ".join(f"`{_value(a)}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words_of(a) for a in arguments if a is not type(None)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {words_of(arguments[0])} to {words_of(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {words_of(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _as_written(annotation) if _is_written(annotation) else _link(annotation)
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _link(cls: type[BaseModel]) -> str:
    return f"[`{cls.__name__}`](#{cls.__name__.lower()})"


def _as_written(cls: type[BaseModel]) -> str:
    """What the docstring of settings that are one value says behind `written`: ``such as `2M tokens` ``."""
    return _docstring(cls).split("\n")[0].partition("written ")[2].removesuffix(".")


def _marked(inner: Any, marks: tuple[Any, ...]) -> str:
    for mark in marks:
        if isinstance(mark, Ref):
            return {"model": "model", "data": "data set"}[mark.kind]
        if isinstance(mark, Varies):
            return "[number](merging.md#by-layer-and-by-name)"
        for words, unit in _UNITS.items():
            if mark in typing.get_args(unit)[1:]:
                return words
    return words_of(inner)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        written = value.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return f"`{_value(written)}`" if written else "its own"
    return "none" if value is None else f"`{_value(value)}`"


def _value(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and value != ""
    return str(value) if plain else json.dumps(value, default=str)


def _is_written(cls: type[BaseModel]) -> bool:
    """Whether people write these settings as one value (`2M tokens`), so that their fields need no table."""
    return bool(cls.__pydantic_decorators__.model_serializers)


def _inner(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The settings types inside the fields of `cls`, depth first."""
    for field in cls.model_fields.values():
        for found in _classes(field.annotation):
            if not _is_written(found):
                yield found
                yield from _inner(found)


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _classes(argument)


if __name__ == "__main__":
    sys.stdout.write(reference())
