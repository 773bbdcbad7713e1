"""YAML with the line of every value, read by the core schema of YAML 1.2: `on` is a word and `1e-3` a number."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from graft.errors import Problem, RequestError

Path = tuple[str | int, ...]


@dataclass
class Document:
    """Plain values, the line (from 1) at which the value of every path stands, and what is wrong with the file; of
    that, keys that are `repeated`."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    repeated: list[Problem] = field(default_factory=list)

    def line(self, path: Path) -> int | None:
        """The line of the value nearest to `path`; steps that are not in the file are passed over."""
        found: Path = ()
        for step in path:
            if (*found, step) in self.lines:
                found = (*found, step)
        return self.lines.get(found)

    def located(self, problem: Problem) -> Problem:
        """The problem with its line."""
        return problem if problem.line is not None else Problem(problem.path, problem.message, self.line(problem.path))


_PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def read_text(path: pathlib.Path, what: str) -> str:
    """The text of a file that is to be `what`, such as `a recipe (a YAML file)`. Raises RequestError where it is not.

    The message says what was found in its place: nothing, a folder, something that is no text.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"expected {what} at {path}, found none") from None
    except IsADirectoryError:
        raise RequestError(f"expected {what} at {path}, found a folder") from None
    except PermissionError:
        raise RequestError(
            f"expected {what} at {path}, found one that may not be read; change its permissions"
        ) from None
    except OSError as error:
        raise RequestError(f"expected {what} at {path}, found none ({error.strerror})") from None
    if b"\0" in content:
        raise RequestError(f"expected {what} at {path}, found binary data")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} in line {line}"
        raise RequestError(f"expected {what} at {path}, in UTF-8, found {found}") from None


def read_yaml(text: str) -> Document:
    """The one document of `text`. Keys that stand twice, broken YAML and tags of other kinds become problems."""
    document = Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            document.value = _value(loader, node, (), document, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = ", ".join(str(w) for w in (error.context, error.problem) if w)
        document.problems.append(Problem((), f"this is not YAML: {words}", mark.line + 1 if mark else None))
    except yaml.YAMLError as error:
        document.problems.append(Problem((), f"this is not YAML: {error}"))
    return document


def _value(loader: _Loader, node: yaml.Node, path: Path, document: Document, above: tuple[int, ...]) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in above:
        document.problems.append(Problem(path, "this value contains itself", node.start_mark.line + 1))
        return None
    above = (*above, id(node))
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN:
        document.problems.append(Problem(path, f"expected plain values, found the tag {node.tag}"))
    if isinstance(node, yaml.MappingNode):
        repeated = list(_repeated(node, path))
        document.repeated += repeated
        document.problems += repeated
        loader.flatten_mapping(node)
        return dict(_items(loader, node, path, document, above))
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*path, i), document, above) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _items(
    loader: _Loader, node: yaml.MappingNode, path: Path, document: Document, above: tuple[int, ...]
) -> Iterator[tuple[Hashable, Any]]:
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float):
            document.problems.append(
                Problem(path, f"expected a name before the colon, found {key!r}", key_node.start_mark.line + 1)
            )
            continue
        step = (*path, key if isinstance(key, int) else str(key))
        document.lines[step] = key_node.start_mark.line + 1
        yield key, _value(loader, value_node, step, document, above)


def _repeated(node: yaml.MappingNode, path: Path) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
            yield Problem((*path, key.value), f"this key stands twice; the first is on line {seen[key.value]}", line)
        seen.setdefault(str(key.value), line)
