"""What is wrong with settings that do not parse, in sentences: from pydantic's errors, one sentence for each fault.

Where one of several types may stand (`tokenizer: {size: 512}` or `{of: MODEL}`), pydantic tells what keeps the value
from being each of them. Here the type is chosen that the value looks most like, and only its faults are told.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from graft.errors import Problem, closest, nearest

Where = tuple[str | int, ...]


INPUT = "Input should be "
WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid dictionary": "a mapping",
    "a valid list": "a list",
    "a valid tuple": "a list",
}
"""How pydantic begins to say what it expects."""


@dataclass(frozen=True)
class _Fault:
    """An error of pydantic: where it is (names of alternatives left out), in which settings, by which alternatives."""

    error: Mapping[str, Any]
    place: Where
    settings: type[BaseModel]
    choices: tuple[tuple[Where, str, Any], ...]
    """(place, pydantic's name, type) of every alternative on the way, the outermost first."""


CALLED = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "on", "use_dora": "dora",
    "use_rslora": "rslora", "layers_to_transform": "layers", "lr": "learning_rate", "epochs": "budget",
    "num_train_epochs": "budget", "max_steps": "budget", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate", "lr_scheduler_type": "schedule", "warmup_steps": "warmup",
    "warmup_ratio": "warmup", "max_grad_norm": "clip", "max_length": "length", "max_seq_length": "length",
    "base_model": "base", "lambda": "scale", "select_topk": "select", "filter_wise": "by",
    "nuslerp_row_wise": "by", "tokenizer_source": "vocabulary", "num_fewshot": "shots", "doc_to_text": "prompt",
    "doc_to_choice": "choices", "doc_to_target": "target", "fewshot_delimiter": "separator",
    "max_gen_toks": "max_tokens", "until": "stop", "test_split": "split",
}  # fmt: skip
"""What peft, transformers, mergekit and lm-eval call a setting → what it is called here."""


def keys_of(cls: type[BaseModel]) -> list[str]:
    """The names a person may write in these settings (aliases where there are some)."""
    return [field.alias or name for name, field in cls.model_fields.items()]


def near_misses(raw: Mapping[Any, Any], keys: Sequence[str], path: Where) -> list[Problem]:
    """The keys of `raw`, which stands at `path`, that are misspellings of those by which its kind is known."""
    near = [key for key in raw if closest(str(key), keys)]
    known = ", ".join(keys)
    return [Problem((*path, key), f"unknown key{nearest(str(key), keys)}; there are: {known}, …") for key in near]


def problems(cls: type[BaseModel], errors: Sequence[Any], raw: Any, path: Where) -> list[Problem]:
    """The faults of `raw`, which stands at `path` and is to be settings of type `cls`, from pydantic's `errors`."""
    return [Problem(path + place, message) for place, message in _told([_fault(cls, e) for e in errors], raw)]


def _fault(cls: type[BaseModel], error: Mapping[str, Any]) -> _Fault:
    """Follows pydantic's location, in which names of alternatives stand between keys, through the types."""
    expected: Any = cls
    settings, place, choices = cls, list[str | int](), list[tuple[Where, str, Any]]()
    for step in error["loc"]:
        expected = _bare(expected)
        if _is_union(expected):
            expected = _alternative(expected, str(step))
            choices.append((tuple(place), str(step), expected))
        elif step != "[key]":
            expected = _inside(expected, step)
            place.append(step)
        settings = expected if _is_settings(expected := _bare(expected)) else settings
    return _Fault(error, tuple(place), settings, tuple(choices))


def _bare(annotation: Any) -> Any:
    """The type without what is said beside it, and without None."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    if _is_union(annotation):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternative(union: Any, name: str) -> Any:
    """The type of a union that pydantic calls `name`: by its class, by the tag that it holds, or by its container."""
    for one in map(_bare, typing.get_args(union)):
        if _is_settings(one) and (one.__name__ in name or name in _tags(one)):
            return one
        if name.startswith(f"{getattr(typing.get_origin(one) or one, '__name__', '?')}"):
            return one
    return None


def _tags(cls: type[BaseModel]) -> Iterator[Any]:
    for field in cls.model_fields.values():
        if typing.get_origin(field.annotation) is typing.Literal:
            yield from typing.get_args(field.annotation)


def _inside(annotation: Any, step: str | int) -> Any:
    """The type of what stands under a key (or at a number) of a value of this type; None where that is not known."""
    if _is_settings(annotation):
        fields = annotation.model_fields.items()
        return next((field.annotation for name, field in fields if step in (name, field.alias)), None)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and isinstance(step, int) and Ellipsis not in arguments:
        return arguments[step] if step < len(arguments) else None
    return arguments[-1] if typing.get_origin(annotation) is dict and arguments else next(iter(arguments), None)


def _told(faults: Sequence[_Fault], raw: Any, depth: int = 0) -> Iterator[tuple[Where, str]]:
    """(place, sentence) of each fault; of those of several alternatives at a place, those of the one that was meant.

    `depth`: of so many alternatives on the way it is decided already.
    """
    done: set[Where] = set()
    for fault in faults:
        if len(fault.choices) <= depth:
            yield fault.place, _sentence(fault)
            continue
        place = fault.choices[depth][0]
        if place not in done:
            done.add(place)
            here = [f for f in faults if len(f.choices) > depth and f.choices[depth][0] == place]
            yield from _of_union(here, place, raw, depth)


def _of_union(faults: Sequence[_Fault], place: Where, raw: Any, depth: int) -> Iterator[tuple[Where, str]]:
    by_name: dict[str, list[_Fault]] = {}
    for fault in faults:
        by_name.setdefault(fault.choices[depth][1], []).append(fault)
    value = _value_at(raw, place)
    meant = _meant(value, {name: found[0].choices[depth][2] for name, found in by_name.items()}, by_name)
    if meant is not None:
        yield from _told(by_name[meant], raw, depth + 1)
        return
    ours = [_sentence(f) for f in faults if f.error["type"] == "value_error"]
    asked = [_wanted(f, *f.choices[depth][1:]) for f in faults]
    yield place, (ours or [f"expected {' or '.join(dict.fromkeys(asked))}, found {value!r}"])[0]


def _value_at(raw: Any, place: Where) -> Any:
    for step in place:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _meant(value: Any, types_: Mapping[str, Any], faults: Mapping[str, Sequence[_Fault]]) -> str | None:
    """The alternative that a value looks like: by the keys it has, else by its being a mapping or a list; or None."""
    if len(types_) == 1:
        return next(iter(types_))
    if isinstance(value, Mapping):
        keys = {name: _known(value, keys_of(one)) for name, one in types_.items() if _is_settings(one)}
        likest = sorted(keys, key=lambda name: (-keys[name], len(faults[name])))
        if likest and keys[likest[0]] > 0:
            return likest[0]
    fits = (Mapping, dict) if isinstance(value, Mapping) else (list, tuple) if isinstance(value, list) else ()
    return next((name for name, one in types_.items() if typing.get_origin(one) in fits), None)


def _known(value: Mapping[Any, Any], keys: Sequence[str]) -> float:
    """How many of a mapping's keys are among `keys`; one that is merely near counts a little less."""
    return sum(1.0 if key in keys else 0.9 if closest(str(key), keys) else 0.0 for key in value)


def _wanted(fault: _Fault, name: str, one: Any) -> str:
    """What an alternative would have been, for a value that resembles none."""
    if _is_settings(one):
        return _mapping(one)
    said = str(fault.error["msg"])
    if not said.startswith(INPUT):
        return name
    wanted = said.removeprefix(INPUT)
    return wanted if fault.error["type"] == "literal_error" else _in_words(wanted.partition(",")[0])


def _in_words(wanted: str) -> str:
    """What pydantic wants, as people who write YAML say it."""
    return WORDS.get(wanted, wanted)


def _mapping(settings: type[BaseModel]) -> str:
    return f"a mapping with {', '.join(keys_of(settings))}"


def _called(key: str, valid: Sequence[str]) -> str:
    """`" (here it is called 'scale')"` for a key that is another package's name of a valid one, else the nearest."""
    here = CALLED.get(key)
    return f" (here it is called {here!r})" if here in valid else nearest(key, valid)


def _sentence(fault: _Fault) -> str:
    error, place = fault.error, fault.place
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        valid = keys_of(fault.settings)
        return f"unknown key{_called(str(place[-1]), valid)}; there are: {', '.join(valid)}"
    if error["type"] == "union_tag_invalid":
        tag, valid = error["ctx"]["tag"], re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
        kind = error["ctx"]["discriminator"].strip("'")
        return f"unknown {kind} {tag!r}{nearest(tag, valid)}; there are: {', '.join(valid)}"
    if error["type"] == "model_type":  # pydantic would name the class
        return f"expected {_mapping(fault.settings)}, found {error['input']!r}"
    if error["type"] == "missing":
        return "this key is required and missing"
    if error["type"] == "value_error":  # a validator of ours says what it found
        return message
    if error["type"] in ("too_short", "too_long"):
        bound, number = ("at least", "min_length") if error["type"] == "too_short" else ("at most", "max_length")
        count = error["ctx"][number]
        return f"expected {bound} {count} item{'s' * (count != 1)}, found {error['input']!r}"
    if message.startswith(INPUT):
        number = "a number " if error["type"].startswith(("greater_than", "less_than")) else ""
        wanted = message.removeprefix(INPUT)
        wanted = wanted.partition(", ")[0] if error["type"].endswith("_parsing") else wanted
        close = (
            nearest(str(error["input"]), re.findall(r"'([^']*)'", wanted)) if error["type"] == "literal_error" else ""
        )
        return f"expected {number}{_in_words(wanted)}, found {error['input']!r}{close}"
    return f"{message[0].lower()}{message[1:]}, found {error['input']!r}"
