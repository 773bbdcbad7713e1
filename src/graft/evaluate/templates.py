"""Templates (jinja) of prompts and answers: they see a record's fields and can do nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from graft.errors import DataError, RequestError

if TYPE_CHECKING:
    from jinja2 import Environment

Record = Mapping[str, Any]


def template(text: str) -> Callable[[Record], str]:
    """What writes `text` of a record. Raises RequestError for what is no template.

    What it gives raises DataError where the template fails on a record: a field that is not there is an error.
    """
    from jinja2 import TemplateSyntaxError

    try:
        made = _sandbox().from_string(text)
    except TemplateSyntaxError as error:
        raise RequestError(f"expected a template (jinja), found {text!r} ({error.message})") from None

    def render(record: Record) -> str:
        try:
            return made.render(record)
        except Exception as error:  # it may compute with the fields: whatever that raises is of its own making
            raise DataError(f"template {text!r}: {error}; the record has {', '.join(map(str, record))}") from error

    return render


def problem(text: str, fields: Collection[str]) -> str | None:
    """Why `text` is no template of records that have these fields; None where it is one."""
    from jinja2 import meta

    try:
        template(text)
    except RequestError as error:
        return str(error)
    strange = meta.find_undeclared_variables(_sandbox().parse(text)) - set(fields) - set(_sandbox().globals)
    if not strange:
        return None
    return f"expected a template of the fields {', '.join(fields)}, found {', '.join(sorted(strange))} in {text!r}"


@cache
def _sandbox() -> Environment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
