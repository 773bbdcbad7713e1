"""Commands that are rooms as well: `graft.merge` is a package, and `graft.merge(...)` does what `graft merge` does."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

COMMANDS = (
    "run",
    "plan",
    "advise",
    "tree",
    "relate",
    "deltas",
    "explain",
    "report",
    "pretrain",
    "tune",
    "adapt",
    "merge",
    "ensemble",
    "quantize",
    "evaluate",
    "gains",
    "head",
    "chat",
    "load",
    "show",
)
"""The functions of `graft.api` that are called as attributes of `graft`."""


class _Room(ModuleType):
    """A module that can be called like the command of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        api = importlib.import_module("graft.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


class Package(ModuleType):
    """The package `graft`: importing a submodule sets it as an attribute here, which is where it becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMMANDS and type(value) is ModuleType:
            value.__class__ = _Room
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise AttributeError(f"module 'graft' has no attribute {name!r}")
        try:
            return importlib.import_module(f"graft.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"graft.{name}":
                raise
        return getattr(importlib.import_module("graft.api"), name)


def install(package: str) -> None:
    """Make the commands callable as attributes of the package; nothing is imported before it is asked for."""
    sys.modules[package].__class__ = Package
