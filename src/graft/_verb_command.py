"""The command of a verb: its options are the fields of the verb's settings, so that each is written once."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from graft.errors import RequestError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.table import Table

    from graft.settings import Settings


FITTING = {f"--{name}": f"--weights.{name}" for name in ("documents", "gate", "top-k")} | {"--on": "--weights.fit"}
"""Options of `graft ensemble fit`, as the settings say them."""


class Commands(TyperGroup):
    """What one does with ensembles may be said behind `graft ensemble`: `show`, `gains` and `fit`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first words name; `ensemble fit` is `ensemble` with its options under `weights`."""
        if args[0] == "ensemble" and args[1:2] in (["show"], ["gains"]):
            args = args[1:]
        elif args[:2] == ["ensemble", "fit"]:
            args = ["ensemble", *map(_fitting, args[2:])]
            if "--help" not in args and not any(word.startswith("--weights.fit") for word in args):
                raise typer.BadParameter(
                    "expected text to fit weights on, as in `graft ensemble fit OUT MODEL… --on FILE`"
                )
        return super().resolve_command(ctx, args)


def _fitting(word: str) -> str:
    name, equals, value = word.partition("=")
    return FITTING.get(name, name) + equals + value


class VerbCommand(TyperCommand):
    """Shows the settings of its verb below its own options."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's options, without those that say nothing to its verb."""
        idle = _idle(str(self.name))
        return [parameter for parameter in super().get_params(ctx) if parameter.name not in idle]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line names the folder and the models, where the verb takes some."""
        fields = fields_of(str(self.name))
        several, one = models_field(fields), model_field(fields)
        models = ["[MODEL[=WEIGHT]]…"] if several else ["[MODEL]"] if one else []
        return ["OUT", *models, *super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words are kept for the help, which comes before they are looked at."""
        ctx.meta["graft.words"] = list(args)
        return super().parse_args(ctx, list(self._flags_alone(ctx, args)))

    def _flags_alone(self, ctx: Any, args: Sequence[str]) -> Iterator[str]:
        """The command's own flags as settings take them: `--hub true` is `--hub`, and `--hub=false` is none."""
        said: dict[str, tuple[list[str], list[str]]] = {}
        for flag in self.get_params(ctx):
            if getattr(flag, "is_flag", False):
                on, off = flag.opts[:1], flag.secondary_opts[:1]
                said |= dict.fromkeys(flag.opts, (on, off))
                said |= dict.fromkeys(flag.secondary_opts, (off, on))
        rest = list(args)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            value = value if equals else "".join(rest[:1])
            if name not in said or value not in ("true", "false"):
                yield word
                continue
            if not equals:
                rest.pop(0)
            yield from said[name][value == "false"]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, then the verb's settings: those of one method where it is named, else what all share."""
        super().format_help(ctx, formatter)
        from rich.console import Console

        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        console = Console()
        for table in _tables(str(self.name), ctx.meta["graft.words"], own):
            console.print(table)


def _idle(verb: str) -> set[str]:
    """Options of the command that a verb has no use for: several processes, a table of methods."""
    from graft.verbs import verb as find

    found = find(verb)
    alone = set(found.types_of({})) == {verb}
    return {*(() if found.together else ("launch",)), *(("methods",) if alone else ())}


def _tables(verb: str, words: Sequence[str], own: Collection[str]) -> Iterator[Table]:
    from rich.markup import escape

    from graft.settings import said_first
    from graft.verbs import verb as find

    methods = dict(find(verb).types())
    whole = methods.pop(verb, None)
    said = {word.rpartition("=")[2] for word in words}
    named = {name: settings for name, settings in methods.items() if name in said}
    for name, settings in named.items():
        within = f"{find(verb).options_in}.{name}." if find(verb).options_in else ""
        yield _settings(f"Settings of {name}", settings.model_fields, own, within)
        for field, each in _listed(settings):
            yield _settings(f"Each of {field}, as {{KEY: VALUE}}", each.model_fields, (), None)
    if whole is not None:
        yield _settings("Settings, each also as --set KEY=VALUE", whole.model_fields, own)
    elif not named:
        yield _settings("Settings of every method, each also as --set KEY=VALUE", _shared(list(methods.values())), own)
    if methods and not named:
        table = _table(f"\nMethods; `graft {verb} NAME --help` shows the settings of one")
        for name, settings in methods.items():
            table.add_row(name, escape(said_first(settings).replace("`", "")))
        yield table


def _listed(settings: type[Settings]) -> Iterator[tuple[str, type[Settings]]]:
    """Fields that hold a list of settings, with the type of these."""
    from graft.settings import Settings as Base

    for name, field in settings.model_fields.items():
        for inside in typing.get_args(field.annotation):
            if typing.get_origin(field.annotation) is list and isinstance(inside, type) and issubclass(inside, Base):
                yield name, inside


def _shared(types: Sequence[type[Settings]]) -> dict[str, FieldInfo]:
    """The fields that all have, apart from the method's name."""
    fields = [settings.model_fields for settings in types]
    shared = {name: _usual([other[name] for other in fields]) for name in fields[0] if all(name in o for o in fields)}
    shared.pop("method", None)
    return shared


def _usual(fields: Sequence[FieldInfo]) -> FieldInfo:
    """The field as most methods describe it."""
    descriptions = [field.description for field in fields]
    return fields[descriptions.index(max(descriptions, key=descriptions.count))]


def _settings(title: str, fields: Mapping[str, FieldInfo], own: Collection[str], within: str | None = "") -> Table:
    """A row a setting. One whose name is an option of the command itself can only be said with --set.

    `within` is what stands before each name, `method.lora.`, where they stand inside another setting; None where they
    are keys of a mapping, and no options.
    """
    from rich.markup import escape

    table = _table(title)
    for name, field in fields.items():
        key = field.alias or name
        option = f"--{within}{key.replace('_', '-')}"
        shown = key if within is None else f"--set {option[2:]}=…" if option in own else option
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        about = escape(field.description or "")
        table.add_row(shown, f"{about} [dim]{escape(f'[{default}]')}[/dim]" if default else about)
    return table


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, show_header=False)


def _default(value: Any) -> str:
    from graft.settings import Settings as Base

    plain = value.plain() if isinstance(value, Base) else value
    return "" if plain is None or plain == {} or plain == [] else f"default: {_written(plain)}"


def _written(value: Any) -> str:
    """A value as it is written in a recipe; what has no value inside of settings is left out."""
    if isinstance(value, Mapping):
        said = {key: inside for key, inside in value.items() if inside is not None}
        bare = len(said) == 1 and next(iter(said.values())) == {}
        return next(iter(said)) if bare else f"{{{', '.join(f'{key}: {_written(one)}' for key, one in said.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fields_of(verb: str, raw: Mapping[str, Any] | None = None) -> dict[str, FieldInfo]:
    """The fields of a verb's settings, by the name that people write; those of its methods where they stand beside.

    With `raw`, what is written already: only those of the method that it names.
    """
    from graft.verbs import verb as find

    types = find(verb).types() if raw is None else find(verb).types_of(raw)
    classes = [types[verb]] if verb in types else list(types.values())
    return {field.alias or name: field for cls in classes for name, field in cls.model_fields.items()}


def methods_of(verb: str, words: Sequence[str]) -> list[dict[str, str]]:
    """The table of a verb's methods. Raises RequestError for words that have no place in it."""
    from graft.verbs import verb as find

    settings: dict[str, Any] = {}
    plain = list(_options(words, settings))
    if plain:
        raise RequestError(f"expected nothing but options beside --methods, found {' '.join(plain)}")
    return find(verb).methods(settings)


def legend_of(verb: str) -> str:
    """What the letters in the table of a verb's methods stand for; empty where it has none."""
    from graft.verbs import verb as find

    return find(verb).legend


def rows_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows with the same keys as a table of `rich`."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold", no_wrap=name == "method")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    return table


def requested(verb: str, words: Sequence[str], assignments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(output folder, settings) of the words after the command. Raises RequestError for words that say nothing."""
    settings: dict[str, Any] = {}
    flags = {n for n, field in fields_of(verb, _named_method(words, assignments)).items() if field.annotation is bool}
    plain = list(_options(words, settings, flags))
    if not plain:
        raise RequestError(f"expected the folder to write, as in `graft {verb} FOLDER …`, found none")
    for word in assignments:
        assigned(settings, word)
    if plain[1:]:
        _add_models(verb, plain[1:], settings)
    _check_places(verb, settings)
    return plain[0], settings


def _check_places(verb: str, settings: Mapping[str, Any]) -> None:
    """Raises RequestError for options of the named method that stand beside it where they belong inside."""
    from graft.misfits import keys_of
    from graft.verbs import verb as find

    inside = find(verb).options_in
    if inside is None:
        return
    said, types = settings.get(inside), find(verb).types()
    name = next(iter(said), None) if isinstance(said, dict) else said
    if not isinstance(name, str) or name not in types or name == verb:
        return
    beside = set(settings) - set(keys_of(types[verb]))
    if lost := [key for key in keys_of(types[name]) if key in beside]:
        options = [key.replace("_", "-") for key in lost]
        wanted = ", ".join(f"--{inside}.{name}.{option}" for option in options)
        found = ", ".join(f"--{option}" for option in options)
        raise RequestError(f"expected {wanted}, found {found}: options of {name} stand inside of `{inside}`")


def _named_method(words: Sequence[str], assignments: Sequence[str]) -> dict[str, str]:
    """`{method: NAME}` where the words name one."""
    following = dict(itertools.pairwise([*words, ""]))
    told = [word.removeprefix("--") for word in (*words, *assignments)]
    named = [word.partition("=")[2] for word in told if word.startswith("method=")]
    named += [following["--method"]] if "--method" in following else []
    return {"method": named[-1]} if named else {}


def _options(words: Sequence[str], settings: dict[str, Any], flags: Collection[str] = ()) -> Iterator[str]:
    """Puts `--key value` and `--key=value` into `settings`; yields the other words.

    `flags` are keys that are true where no value stands behind them.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield word
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            alone = key.replace("-", "_") in flags and rest[:1] not in (["true"], ["false"])
            if not alone and not rest:
                raise RequestError(f"expected a value after {word}, found none")
            value = "true" if alone else rest.pop(0)
        assigned(settings, f"{key.replace('-', '_')}={value}")


def assigned(settings: dict[str, Any], word: str) -> None:
    """Put `key=value` or `outer.inner=value` into `settings`; the value is read as YAML, a text where it is none.

    Raises RequestError where it has a key twice, of which one would be lost.
    """
    from graft.yaml_lines import read_yaml

    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RequestError(f"expected KEY=VALUE, found {word!r}")
    document = read_yaml(text)
    if document.repeated:
        twice = ".".join(map(str, document.repeated[0].path))
        raise RequestError(f"{key}: expected every key once, found {twice} twice in {text}")
    *outer, last = key.split(".")
    for step in outer:
        if isinstance(settings.get(step), str):  # `--method lora --set method.lora.rank=4`
            settings[step] = {settings[step]: {}}
        within = settings.setdefault(step, {})
        if not isinstance(within, dict):
            raise RequestError(
                f"expected settings inside of {step}, for {key}, found {step}={within}: write them all so"
            )
        settings = within
    settings[last] = text if document.problems else document.value


def _add_models(verb: str, words: Sequence[str], settings: dict[str, Any]) -> None:
    """`A=0.5 B=0.5`, or `A B`, into the field of the settings that holds models; one model where one is asked for."""
    fields = fields_of(verb, settings)
    field = models_field(fields) or model_field(fields)
    if field is None:
        raise RequestError(f"expected one folder, found {' '.join(words)} as well: {verb} makes a model of none")
    if field in settings:
        raise RequestError(
            f"expected the models behind the folder or as --{field}, found both: {' '.join(words)} and "
            f"{settings[field]!r}"
        )
    if models_field(fields) is None:
        if len(words) > 1:
            raise RequestError(f"expected one model behind the folder, found {len(words)}: {' '.join(words)}")
        settings[field] = words[0]
        return
    pairs = [word.rpartition("=") for word in words]
    weights = [text for _, equals, text in pairs if equals]
    if not weights:
        settings[field] = list(words)
    elif len(weights) < len(pairs):
        raise RequestError(f"expected a weight for every model or for none, found {' '.join(words)}")
    elif twice := [name for place, (name, _, _) in enumerate(pairs) if name in [each for each, _, _ in pairs[:place]]]:
        raise RequestError(f"expected a weight for each model once, found {twice[0]!r} twice in {' '.join(words)}")
    else:
        settings[field] = {name: _number(text) for name, _, text in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"expected a weight such as 0.5 behind the =, found {text!r}") from None


def models_field(fields: Mapping[str, FieldInfo]) -> str | None:
    """The field that holds several models, by its type."""
    for name, field in fields.items():
        if _holds_models(field.annotation):
            return name
    return None


def model_field(fields: Mapping[str, FieldInfo]) -> str | None:
    """The field that names the one model there has to be, by its type."""
    from graft.settings import Ref

    named = (name for name, field in fields.items() if field.is_required() and Ref("model") in field.metadata)
    return next(named, None)


def _holds_models(annotation: Any, inside: bool = False) -> bool:
    from graft.settings import Ref

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        mark = any(isinstance(m, Ref) and m.kind == "model" for m in arguments[1:])
        return (inside and mark) or _holds_models(arguments[0], inside)
    inside = inside or origin in (list, dict, tuple)
    return any(_holds_models(argument, inside) for argument in arguments)
